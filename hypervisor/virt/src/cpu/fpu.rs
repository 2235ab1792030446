//! FPU and extended state: x87, SSE, AVX and later components, and XCR0, which says which are on.
//!
//! Unsafe: XSAVE, XRSTOR and XSETBV, on an area that CPUID gives the size of.

use alloc::{boxed::Box, vec};
use core::arch::asm;

use x86_64::registers::control::{Cr0, Cr0Flags, Cr4, Cr4Flags};

use super::{msr, wrmsr};

/// Feature bits of XCR0 (SDM vol. 3A, section 2.6).
mod xcr0 {
    pub(super) const X87: u64 = 1 << 0;
    pub(super) const SSE: u64 = 1 << 1;
    pub(super) const AVX: u64 = 1 << 2;
    pub(super) const MPX: u64 = 0b11 << 3;
    pub(super) const AVX512: u64 = 0b111 << 5;
    pub(super) const PKRU: u64 = 1 << 9;
    /// What Plinth switches between guests; AMX and later components stay off.
    pub(super) const SWITCHED: u64 = X87 | SSE | AVX | MPX | AVX512 | PKRU;
}

/// How this processor saves FPU and extended state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FpuFeatures {
    /// XSAVE is there; otherwise FXSAVE is used.
    xsave: bool,
    /// XSAVES is there, and with it IA32_XSS.
    xsaves: bool,
    /// XCR0 bits that guests may set and that are switched.
    mask: u64,
    /// Bytes of the save area.
    size: usize,
    /// Where in it the upper halves of the YMM registers are; 0: nowhere.
    avx: usize,
}

impl FpuFeatures {
    /// Legacy area and XSAVE header (SDM vol. 1, sections 13.4.1 and 13.4.2).
    const XSAVE_MIN: usize = 576;

    /// Reads CPUID.
    pub fn detect() -> Self {
        let cpuid = raw_cpuid::CpuId::new();
        let xsave = cpuid.get_feature_info().is_some_and(|f| f.has_xsave());
        if !xsave {
            return FpuFeatures {
                xsave,
                xsaves: false,
                mask: xcr0::X87,
                size: 512,
                avx: 0,
            };
        }
        let leaf = core::arch::x86_64::__cpuid_count(0xd, 0);
        let offered = u64::from(leaf.edx) << 32 | u64::from(leaf.eax);
        let mut mask = (offered & xcr0::SWITCHED) | xcr0::X87;
        for group in [xcr0::MPX, xcr0::AVX512] {
            if mask & group != group {
                mask &= !group;
            }
        }
        // Standard format: each component has a fixed offset and size in its sub-leaf.
        let size = (2..63)
            .filter(|i| mask & (1 << i) != 0)
            .map(|i| {
                let component = core::arch::x86_64::__cpuid_count(0xd, i);
                component.ebx as usize + component.eax as usize
            })
            .fold(Self::XSAVE_MIN, usize::max);
        let avx = if mask & xcr0::AVX != 0 {
            core::arch::x86_64::__cpuid_count(0xd, 2).ebx as usize
        } else {
            0
        };
        // Bit 3 of sub-leaf 1, EAX (SDM vol. 1, section 13.2).
        let xsaves = core::arch::x86_64::__cpuid_count(0xd, 1).eax & 1 << 3 != 0;
        FpuFeatures {
            xsave,
            xsaves,
            mask,
            size,
            avx,
        }
    }

    /// Whether there are protection keys, and their register is switched.
    const fn has_pkru(&self) -> bool {
        self.mask & xcr0::PKRU != 0
    }

    /// XCR0 bits that a guest may set, 1 when the processor has no XSAVE.
    pub const fn xcr0_mask(&self) -> u64 {
        self.mask
    }

    /// Whether XSETBV takes this value here (SDM vol. 3A, section 2.6; vol. 1, section 13.3).
    pub const fn accepts_xcr0(&self, value: u64) -> bool {
        let pairs = (value & xcr0::MPX == 0 || value & xcr0::MPX == xcr0::MPX)
            && (value & xcr0::AVX512 == 0
                || value & (xcr0::AVX512 | xcr0::AVX) == (xcr0::AVX512 | xcr0::AVX))
            && (value & xcr0::AVX == 0 || value & xcr0::SSE != 0);
        value & !self.mask == 0 && value & xcr0::X87 != 0 && pairs
    }

    /// Makes FPU instructions and XSAVE usable at privilege level 0 on the calling pCPU.
    ///
    /// # Safety
    /// No code of the hypervisor relies on FPU instructions faulting (CR0.EM, CR0.TS).
    pub unsafe fn prepare(&self) {
        let mut cr4 = Cr4Flags::OSFXSR | Cr4Flags::OSXMMEXCPT_ENABLE;
        cr4.set(Cr4Flags::OSXSAVE, self.xsave);
        // For RDPKRU: the hypervisor maps no user pages, so that keys bar it from nothing.
        cr4.set(Cr4Flags::PROTECTION_KEY_USER, self.has_pkru());
        // SAFETY: every x86-64 processor has FXSR and SSE; OSXSAVE is set only where CPUID
        // reports XSAVE, PKE where it reports PKRU. None of these bits affects memory safety.
        unsafe {
            Cr0::update(|f| {
                f.insert(Cr0Flags::MONITOR_COPROCESSOR);
                f.remove(Cr0Flags::EMULATE_COPROCESSOR | Cr0Flags::TASK_SWITCHED);
            });
            Cr4::update(|f| f.insert(cr4));
        }
        self.write_xcr0(self.mask);
        if self.xsaves {
            // Guests have no component that it governs: their XSAVES saves none, and CET, processor trace and
            // the like are hidden from them. What firmware left on would be in a guest's hands.
            // SAFETY: CPUID reports the register; 0 is its value after reset.
            unsafe { wrmsr(msr::XSS, 0) };
        }
    }

    /// XCR0 of this pCPU; `xsave` must be there, and `prepare` have run.
    fn read_xcr0(&self) -> u64 {
        let (low, high): (u32, u32);
        // SAFETY: the processor has XSAVE and CR4.OSXSAVE is set, so XGETBV of register 0 only reads.
        unsafe {
            asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
        }
        u64::from(high) << 32 | u64::from(low)
    }

    /// Writes XCR0, if the processor has it and takes the value.
    fn write_xcr0(&self, value: u64) {
        if self.xsave && self.accepts_xcr0(value) {
            // SAFETY: as is demanded.
            unsafe { Self::put_xcr0(value) };
        }
    }

    /// Writes XCR0 of this pCPU.
    ///
    /// # Safety
    /// The processor has XSAVE and takes the value; `prepare` ran on this pCPU, or is running.
    unsafe fn put_xcr0(value: u64) {
        // SAFETY: `prepare` set CR4.OSXSAVE, and the value is one that XSETBV takes (the caller's promise), so that it
        // does not fault. The hypervisor uses none of the registers that XCR0 governs.
        unsafe {
            asm!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") (value >> 32) as u32,
                 options(nomem, nostack, preserves_flags));
        }
    }
}

/// A part of the save area, as aligned as XSAVE wants it (SDM vol. 1, section 13.4).
#[derive(Clone)]
#[repr(C, align(64))]
struct Line([u8; 64]);

const _: () = assert!(size_of::<Line>() == 64 && align_of::<Line>() == 64);

/// A guest's FPU and extended state and its XCR0, in memory while its vCPU is not loaded.
pub struct GuestFpu {
    features: FpuFeatures,
    area: Box<[Line]>,
    xcr0: u64,
}

impl GuestFpu {
    /// Line of the legacy area with FCW (byte 0) and MXCSR (byte 24) (SDM vol. 1, table 13-1).
    const CONTROL_LINE: usize = 0;
    /// FCW after FNINIT.
    const INITIAL_FCW: u16 = 0x037f;

    /// State after initialization: x87 as after FNINIT, MXCSR 0x1f80, all else zero, XCR0 = 1.
    pub fn new(features: FpuFeatures) -> Self {
        let mut area = vec![Line([0; 64]); features.size.div_ceil(64)].into_boxed_slice();
        if let Some(line) = area.get_mut(Self::CONTROL_LINE) {
            line.0[0..2].copy_from_slice(&Self::INITIAL_FCW.to_le_bytes());
            line.0[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
        }
        GuestFpu {
            features,
            area,
            xcr0: xcr0::X87,
        }
    }

    /// Puts the guest's state and XCR0 into the registers.
    ///
    /// # Safety
    /// `FpuFeatures::prepare` ran on this pCPU, and no other guest's state is in its registers.
    pub unsafe fn load(&self) {
        let area = self.area.as_ptr();
        if self.features.xsave {
            // All components, also those off in the guest's XCR0 now: it may turn them on again. XCR0 may be the guest's
            // already, if its vCPU was set up just now; what XRSTOR then left alone would be another guest's. Most often
            // `save` has left it so: XSETBV serializes, to look does not.
            if self.features.read_xcr0() != self.features.mask {
                // SAFETY: `prepare` ran, and has written this value.
                unsafe { FpuFeatures::put_xcr0(self.features.mask) };
            }
            // SAFETY: the area is 64-byte aligned, as long as the components of `mask` need,
            // and holds what `save` or `new` wrote, so nothing in it is reserved.
            unsafe {
                asm!("xrstor64 [{}]", in(reg) area, in("eax") self.features.mask as u32,
                     in("edx") (self.features.mask >> 32) as u32, options(readonly, nostack, preserves_flags));
            }
            if self.xcr0 != self.features.mask {
                // SAFETY: `prepare` ran; `set_xcr0` has checked the value, or it was read from the register.
                unsafe { FpuFeatures::put_xcr0(self.xcr0) };
            }
        } else {
            // SAFETY: the area has 512 bytes, aligned, written by FXSAVE or `new`.
            unsafe {
                asm!("fxrstor64 [{}]", in(reg) area, options(readonly, nostack, preserves_flags));
            }
        }
    }

    /// Takes the guest's state out of the registers, and leaves XCR0 as `prepare` set it.
    ///
    /// # Safety
    /// `load` of this value was called on this pCPU and its state is still in the registers.
    pub unsafe fn save(&mut self) {
        let area = self.area.as_mut_ptr();
        if self.features.xsave {
            self.xcr0 = self.features.read_xcr0();
            if self.xcr0 != self.features.mask {
                // SAFETY: `prepare` ran, and has written this value.
                unsafe { FpuFeatures::put_xcr0(self.features.mask) };
            }
            // SAFETY: the area is 64-byte aligned and as long as the components of `mask` need.
            unsafe {
                asm!("xsave64 [{}]", in(reg) area, in("eax") self.features.mask as u32,
                     in("edx") (self.features.mask >> 32) as u32, options(nostack, preserves_flags));
            }
        } else {
            // SAFETY: the area has 512 bytes and is aligned.
            unsafe {
                asm!("fxsave64 [{}]", in(reg) area, options(nostack, preserves_flags));
            }
        }
    }

    /// The guest's XCR0. While `loaded` it is read from the register: QEMU 7.2 (TCG) does not
    /// intercept XSETBV, so that the guest may have changed it.
    pub fn xcr0(&self, loaded: bool) -> u64 {
        if loaded && self.features.xsave {
            self.features.read_xcr0()
        } else {
            self.xcr0
        }
    }

    /// The guest's PKRU while its state is `loaded`; 0 otherwise, and where there is none.
    pub fn pkru(&self, loaded: bool) -> u32 {
        if !loaded || !self.features.has_pkru() {
            return 0;
        }
        let pkru: u32;
        // SAFETY: the processor has protection keys and `prepare` set CR4.PKE, so RDPKRU with ECX = 0 only reads.
        unsafe {
            asm!("rdpkru", in("ecx") 0, out("eax") pkru, out("edx") _, options(nomem, nostack, preserves_flags));
        }
        pkru
    }

    /// Sets the guest's XCR0. While `loaded`, also the register. A value that the processor
    /// would refuse (`FpuFeatures::accepts_xcr0`) changes nothing.
    pub fn set_xcr0(&mut self, value: u64, loaded: bool) {
        if self.features.accepts_xcr0(value) {
            self.xcr0 = value;
            if loaded {
                self.features.write_xcr0(value);
            }
        }
    }
}

/// Places in the save area (SDM vol. 1, tables 10-2 and 13-1).
mod area {
    pub(super) const FSW: usize = 2;
    pub(super) const FTW: usize = 4;
    pub(super) const MXCSR: usize = 24;
    pub(super) const MXCSR_MASK: usize = 28;
    pub(super) const X87: usize = 32;
    pub(super) const XMM: usize = 160;
    pub(super) const XMM_END: usize = 416;
    pub(super) const XSTATE_BV: usize = 512;
}

/// Single registers, for the emulation of an instruction that moves one to or from a device.
impl GuestFpu {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        core::array::from_fn(|n| {
            let line = self.area.get((at + n) / 64);
            line.map_or(0, |line| line.0[(at + n) % 64])
        })
    }

    fn set_bytes(&mut self, at: usize, bytes: &[u8]) {
        for (n, byte) in bytes.iter().enumerate() {
            if let Some(line) = self.area.get_mut((at + n) / 64) {
                line.0[(at + n) % 64] = *byte;
            }
        }
    }

    /// The save area is made to hold what the registers hold. XCR0 stays the guest's.
    fn refresh(&mut self, loaded: bool) {
        if loaded {
            // SAFETY: the guest's state is in the registers (`loaded`).
            unsafe { self.save() };
            self.features.write_xcr0(self.xcr0);
        }
    }

    /// What was changed in the save area comes into force.
    fn replace(&mut self, components: u64, loaded: bool) {
        if self.features.xsave {
            let in_use = u64::from_le_bytes(self.bytes(area::XSTATE_BV)) | components;
            self.set_bytes(area::XSTATE_BV, &in_use.to_le_bytes());
        }
        if loaded {
            // SAFETY: `refresh` saved the registers, so no state is lost, and the processor is prepared
            // for it as for the `load` before.
            unsafe { self.load() };
        }
    }

    /// An XMM register and the upper half of its YMM register, or zeros where there is none.
    pub fn vector(&mut self, number: u8, loaded: bool) -> [u8; 32] {
        self.refresh(loaded);
        let number = usize::from(number & 15);
        let mut value = [0; 32];
        value[..16].copy_from_slice(&self.bytes::<16>(area::XMM + 16 * number));
        if self.has_upper_halves() {
            value[16..].copy_from_slice(&self.bytes::<16>(self.features.avx + 16 * number));
        }
        value
    }

    /// Whether the area holds upper halves: a component that is in its initial state is not written.
    fn has_upper_halves(&self) -> bool {
        let in_use = u64::from_le_bytes(self.bytes(area::XSTATE_BV));
        self.features.avx != 0 && in_use & xcr0::AVX != 0
    }

    /// Sets an XMM register and, where there is one, the upper half of its YMM register.
    pub fn set_vector(&mut self, number: u8, value: &[u8; 32], loaded: bool) {
        self.refresh(loaded);
        let number = usize::from(number & 15);
        self.set_bytes(area::XMM + 16 * number, &value[..16]);
        let mut components = xcr0::SSE;
        if self.features.avx != 0 && value[16..] != [0; 16] || self.has_upper_halves() {
            if !self.has_upper_halves() {
                self.set_bytes(self.features.avx, &[0; 256]);
            }
            self.set_bytes(self.features.avx + 16 * number, &value[16..]);
            components |= xcr0::AVX;
        }
        self.replace(components, loaded);
    }

    /// The area's place of a physical x87 register: it holds them in the order of the stack.
    fn x87_place(&self, number: usize) -> usize {
        let top = usize::from(u16::from_le_bytes(self.bytes(area::FSW)) >> 11 & 7);
        area::X87 + 16 * (number.wrapping_sub(top) & 7)
    }

    /// The legacy area: x87, MXCSR and the XMM registers.
    pub fn legacy(&mut self, loaded: bool) -> [u8; 512] {
        self.refresh(loaded);
        let mut image: [u8; 512] = self.bytes(0);
        if self.features.xsave {
            // What is in its initial state need not have been stored.
            let in_use = u64::from_le_bytes(self.bytes(area::XSTATE_BV));
            if in_use & xcr0::X87 == 0 {
                image[..area::MXCSR].fill(0);
                image[..2].copy_from_slice(&Self::INITIAL_FCW.to_le_bytes());
                image[area::X87..area::XMM].fill(0);
            }
            if in_use & xcr0::SSE == 0 {
                image[area::XMM..area::XMM_END].fill(0);
            }
        }
        image
    }

    /// Sets them. MXCSR's mask, and what is behind the registers, stay as they are.
    pub fn set_legacy(&mut self, image: &[u8; 512], loaded: bool) {
        self.refresh(loaded);
        self.set_bytes(0, &image[..area::MXCSR_MASK]);
        self.set_bytes(area::X87, &image[area::X87..area::XMM_END]);
        self.replace(xcr0::X87 | xcr0::SSE, loaded);
    }

    /// An MMX register.
    pub fn mmx(&mut self, number: u8, loaded: bool) -> u64 {
        self.refresh(loaded);
        u64::from_le_bytes(self.bytes(self.x87_place(usize::from(number))))
    }

    /// Sets an MMX register; all are in use then, and the top of the stack is 0 (SDM vol. 1, section 9.6.2).
    pub fn set_mmx(&mut self, number: u8, value: u64, loaded: bool) {
        self.refresh(loaded);
        let registers: [[u8; 16]; 8] =
            core::array::from_fn(|number| self.bytes(self.x87_place(number)));
        for (number, register) in registers.iter().enumerate() {
            self.set_bytes(area::X87 + 16 * number, register);
        }
        let status = u16::from_le_bytes(self.bytes(area::FSW)) & !(7 << 11);
        self.set_bytes(area::FSW, &status.to_le_bytes());
        self.set_bytes(area::FTW, &[0xff]);
        let place = area::X87 + 16 * usize::from(number & 7);
        self.set_bytes(place, &value.to_le_bytes());
        self.set_bytes(place + 8, &[0xff; 2]);
        self.replace(xcr0::X87, loaded);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xcr0_rules_follow_the_manual() {
        let full = FpuFeatures {
            xsave: true,
            xsaves: true,
            mask: xcr0::SWITCHED,
            size: 0xa80,
            avx: 0x240,
        };
        for good in [1, 3, 7, 0x1f, 0xe7, 0x2ff] {
            assert!(full.accepts_xcr0(good), "{good:#x}");
        }
        for bad in [0, 2, 5, 0xb, 0xe3, 0x27, 0x107, 1 << 17 | 3] {
            assert!(!full.accepts_xcr0(bad), "{bad:#x}");
        }
        let sse = FpuFeatures {
            xsave: true,
            xsaves: false,
            mask: 3,
            size: 576,
            avx: 0,
        };
        assert!(sse.accepts_xcr0(3) && !sse.accepts_xcr0(7));
    }

    #[test]
    fn detected_area_holds_every_component() {
        let f = FpuFeatures::detect();
        let area = GuestFpu::new(f);
        assert!(area.area.len() * 64 >= f.size && f.size >= 512);
        assert!(!f.xsave || f.accepts_xcr0(f.mask));
        assert_eq!(area.area[0].0[0..2], [0x7f, 0x03]);
        assert_eq!(area.area[0].0[24..28], [0x80, 0x1f, 0, 0]);
    }

    #[test]
    fn refused_xcr0_changes_nothing() {
        let mut fpu = GuestFpu::new(FpuFeatures::detect());
        fpu.set_xcr0(0, false);
        assert_eq!(fpu.xcr0(false), 1);
        fpu.set_xcr0(fpu.features.mask, false);
        assert_eq!(fpu.xcr0(false), fpu.features.mask);
    }

    #[test]
    fn single_registers_are_set_and_read_back() {
        let mut fpu = GuestFpu::new(FpuFeatures::detect());
        let value = core::array::from_fn(|n| n as u8 + 1);
        fpu.set_vector(3, &value, false);
        let wide = fpu.features.avx != 0;
        let got = fpu.vector(3, false);
        assert_eq!(got[..16], value[..16]);
        assert_eq!(got[16..] == value[16..], wide);
        assert_eq!(fpu.vector(2, false), [0; 32]);
        // The stack's top is 5: ST(0) is register 5, and goes there when MMX takes over.
        fpu.set_bytes(area::FSW, &(5_u16 << 11).to_le_bytes());
        fpu.set_bytes(area::X87, &77_u64.to_le_bytes());
        assert_eq!(fpu.mmx(5, false), 77);
        fpu.set_mmx(1, 99, false);
        assert_eq!((fpu.mmx(1, false), fpu.mmx(5, false)), (99, 77));
        assert_eq!(fpu.bytes::<3>(area::FSW), [0, 0, 0xff]);
    }
}

//! The FPU's control words and its whole legacy state, stored to and loaded from device memory.
//!
//! FXSAVE, FXRSTOR, LDMXCSR, STMXCSR, FLDCW, FSTCW, FSTSW: what the kinds of system that touch device memory with
//! the FPU at all do. x87 numbers and the XSAVE area are not moved this way.

use iced_x86::Mnemonic;
use mem::Width;
use virt::{CpuMode, VirtualCpu};

use super::{
    Exception, Platform,
    execute::{Run, Stop},
};
use crate::walk::Access;

/// Places in the FXSAVE image (SDM vol. 1, table 10-2).
const FCW: usize = 0;
const FSW: usize = 2;
const FIP_HIGH: usize = 12;
const FDP_HIGH: usize = 20;
const MXCSR: usize = 24;
const MXCSR_MASK: usize = 28;
const XMM8: usize = 288;
const IMAGE_BYTES: usize = 512;
/// What FXRSTOR reads and FXSAVE writes: the rest is software's.
const USED_BYTES: usize = 416;
/// The bits of MXCSR where the image names none.
const MXCSR_DEFAULT_MASK: u32 = 0xffbf;
const CR0_EM: u64 = 1 << 2;
const CR0_TS: u64 = 1 << 3;

fn word(image: &[u8; IMAGE_BYTES], at: usize) -> u32 {
    let bytes = image.get(at..at + 4).and_then(|b| b.try_into().ok());
    bytes.map_or(0, u32::from_le_bytes)
}

impl<V: VirtualCpu, P: Platform<V>> Run<'_, V, P> {
    /// Executes one of these instructions; `false`: another one.
    pub(super) fn fpu(&mut self) -> Result<bool, Stop> {
        let mnemonic = self.instruction.mnemonic();
        let wide = matches!(mnemonic, Mnemonic::Fxsave64 | Mnemonic::Fxrstor64);
        match mnemonic {
            Mnemonic::Fnstcw | Mnemonic::Fstcw => self.store_control(FCW, Width::Word)?,
            Mnemonic::Fnstsw | Mnemonic::Fstsw => self.store_control(FSW, Width::Word)?,
            Mnemonic::Stmxcsr | Mnemonic::Vstmxcsr => self.store_control(MXCSR, Width::Dword)?,
            Mnemonic::Fldcw => self.load_control(FCW, Width::Word)?,
            Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr => self.load_control(MXCSR, Width::Dword)?,
            Mnemonic::Fxsave | Mnemonic::Fxsave64 => self.save_image(wide)?,
            Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => self.load_image(wide)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// #NM where the FPU is not to be used, which the processor has checked unless the code is in device memory.
    fn check_fpu(&self) -> Result<(), Stop> {
        if self.paging.cr0 & (CR0_EM | CR0_TS) != 0 {
            return Err(Stop::Fault(Exception::NO_FPU));
        }
        Ok(())
    }

    fn store_control(&mut self, at: usize, width: Width) -> Result<(), Stop> {
        self.check_fpu()?;
        let image = self.cpu.legacy_fpu();
        self.set(0, u64::from(word(&image, at)) & width.mask())
    }

    fn load_control(&mut self, at: usize, width: Width) -> Result<(), Stop> {
        self.check_fpu()?;
        let value = self.get(0)?.to_le_bytes();
        let mut image = self.cpu.legacy_fpu();
        if let (Some(to), Some(from)) = (
            image.get_mut(at..at + width.bytes()),
            value.get(..width.bytes()),
        ) {
            to.copy_from_slice(from);
        }
        self.replace_image(&image)
    }

    /// Makes an image the FPU's state; #GP(0) for bits of MXCSR that the processor lacks.
    fn replace_image(&mut self, image: &[u8; IMAGE_BYTES]) -> Result<(), Stop> {
        let mask = match word(&self.cpu.legacy_fpu(), MXCSR_MASK) {
            0 => MXCSR_DEFAULT_MASK,
            mask => mask,
        };
        if word(image, MXCSR) & !mask != 0 {
            return Err(Stop::Fault(Exception::GENERAL_PROTECTION));
        }
        self.cpu.set_legacy_fpu(image);
        Ok(())
    }

    /// Bytes of the image that this mode has, and its place. #GP(0) if that is not aligned.
    fn image_place(&mut self, access: Access) -> Result<(mem::Gva, usize), Stop> {
        self.check_fpu()?;
        let at = self.operand_address_for(0, access)?;
        if !at.0.is_multiple_of(16) {
            return Err(Stop::Fault(Exception::GENERAL_PROTECTION));
        }
        self.target = None;
        let bytes = if self.mode == CpuMode::Long64 {
            USED_BYTES
        } else {
            XMM8
        };
        Ok((at, bytes))
    }

    fn save_image(&mut self, wide: bool) -> Result<(), Stop> {
        let (at, bytes) = self.image_place(Access::Write)?;
        let mut image = self.cpu.legacy_fpu();
        if !wide {
            // The upper halves of the pointers are selectors there, which processors do not keep any more.
            for place in [FIP_HIGH, FDP_HIGH] {
                if let Some(half) = image.get_mut(place..place + 4) {
                    half.fill(0);
                }
            }
        }
        self.store_wide(at, image.get(..bytes).unwrap_or_default())
    }

    fn load_image(&mut self, wide: bool) -> Result<(), Stop> {
        let (at, bytes) = self.image_place(Access::Read)?;
        let mut image = self.cpu.legacy_fpu();
        self.load_wide(at, image.get_mut(..bytes).unwrap_or_default())?;
        if !wide {
            for place in [FIP_HIGH, FDP_HIGH] {
                if let Some(half) = image.get_mut(place..place + 4) {
                    half.fill(0);
                }
            }
        }
        self.replace_image(&image)
    }
}

//! Why a VM entry was refused: the manual's checks in software, in words.
//!
//! [`check`] is a pure function over a snapshot of the VMCS ([`VmcsFields`]), so it is tested
//! on the host. It covers the checks of SDM vol. 3C, sections 27.2 and 27.3.1, for the fields
//! that Plinth uses; it runs only after a refusal, never on the way into a guest.

use alloc::{collections::BTreeMap, format, string::String, vec::Vec};

use super::capability::{
    Capabilities, EntryControls, EptVpid, ExitControls, Fixed, Pin, Proc, Proc2,
};
use super::decode::InterruptionInfo;
use super::vmcs::{Field, SegmentFields};
use crate::SegmentName;
use crate::cpu::{is_canonical, is_pat};
use crate::state::AccessRights;

/// A snapshot of the fields that this processor has.
#[derive(Clone, Debug, Default)]
pub struct VmcsFields(BTreeMap<Field, u64>);

impl VmcsFields {
    /// Reads every field with `read`, which returns `None` for one that is not there.
    pub fn collect(read: impl Fn(Field) -> Option<u64>) -> Self {
        VmcsFields(
            Field::ALL
                .iter()
                .filter_map(|&f| read(f).map(|value| (f, value)))
                .collect(),
        )
    }

    /// A field's value; 0 for one that is not there.
    pub fn get(&self, field: Field) -> u64 {
        self.0.get(&field).copied().unwrap_or(0)
    }

    fn get32(&self, field: Field) -> u32 {
        self.get(field) as u32
    }
}

const CR0_PE: u64 = 1 << 0;
const CR0_PG: u64 = 1 << 31;
const CR0_NW_CD: u64 = 1 << 29 | 1 << 30;
const CR4_PAE: u64 = 1 << 5;
const CR4_PCIDE: u64 = 1 << 17;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const EFER_DEFINED: u64 = 1 << 0 | EFER_LME | EFER_LMA | 1 << 11;
const RFLAGS_TF: u64 = 1 << 8;
const RFLAGS_IF: u64 = 1 << 9;
const RFLAGS_VM: u64 = 1 << 17;
const RFLAGS_RESERVED: u64 = !((1 << 22) - 1) | 1 << 15 | 1 << 5 | 1 << 3;
const DEBUGCTL_BTF: u64 = 1 << 1;
const BLOCKED_BY_STI: u32 = 1 << 0;
const BLOCKED_BY_MOV_SS: u32 = 1 << 1;
const BLOCKED_BY_NMI: u32 = 1 << 3;
const PENDING_DEBUG_BS: u64 = 1 << 14;

/// Collects failed checks.
struct Report<'a> {
    fields: &'a VmcsFields,
    capabilities: &'a Capabilities,
    failures: Vec<String>,
}

/// Adds a formatted line when a condition does not hold.
macro_rules! require {
    ($report:expr, $condition:expr, $($text:tt)*) => {
        if !$condition {
            $report.failures.push(format!($($text)*));
        }
    };
}

/// Every check that the snapshot fails, one line each; empty when none does.
pub fn check(fields: &VmcsFields, capabilities: &Capabilities) -> Vec<String> {
    let mut report = Report {
        fields,
        capabilities,
        failures: Vec::new(),
    };
    report.controls();
    report.injection();
    report.host();
    report.guest_control_registers();
    report.guest_segments();
    report.guest_rip_and_rflags();
    report.guest_activity();
    report.guest_pdptes();
    report.failures
}

impl Report<'_> {
    fn get(&self, field: Field) -> u64 {
        self.fields.get(field)
    }

    fn get32(&self, field: Field) -> u32 {
        self.fields.get32(field)
    }

    fn pin(&self) -> Pin {
        Pin::from_bits_retain(self.get32(Field::PinControls))
    }

    fn proc(&self) -> Proc {
        Proc::from_bits_retain(self.get32(Field::ProcessorControls))
    }

    fn proc2(&self) -> Proc2 {
        if self.proc().contains(Proc::SECONDARY) {
            Proc2::from_bits_retain(self.get32(Field::SecondaryControls))
        } else {
            Proc2::empty()
        }
    }

    fn ia32e(&self) -> bool {
        EntryControls::from_bits_retain(self.get32(Field::EntryControls))
            .contains(EntryControls::IA32E_GUEST)
    }

    fn unrestricted(&self) -> bool {
        self.proc2().contains(Proc2::UNRESTRICTED_GUEST)
    }

    fn is_physical(&self, address: u64) -> bool {
        address >> self.capabilities.physical_bits.min(63) == 0
    }

    fn injected(&self) -> Option<InterruptionInfo> {
        let info = InterruptionInfo(self.get32(Field::EntryInterruptionInfo));
        info.is_valid().then_some(info)
    }

    /// SDM vol. 3C, section 27.2.1.
    fn controls(&mut self) {
        let c = self.capabilities;
        for (name, field, allowed) in [
            ("pin-based", Field::PinControls, c.pin),
            ("processor-based", Field::ProcessorControls, c.proc),
            ("VM-exit", Field::ExitControls, c.exit),
            ("VM-entry", Field::EntryControls, c.entry),
        ] {
            let value = self.get32(field);
            require!(
                self,
                allowed.accepts(value),
                "{name} controls {value:#x}: must have {:#x}, may have {:#x}",
                allowed.must,
                allowed.may
            );
        }
        let proc2 = self.proc2();
        require!(
            self,
            c.proc2.accepts(proc2.bits()),
            "secondary controls {:#x}: must have {:#x}, may have {:#x}",
            proc2.bits(),
            c.proc2.must,
            c.proc2.may
        );
        let (pin, proc) = (self.pin(), self.proc());
        require!(
            self,
            self.get(Field::Cr3TargetCount) <= 4,
            "more than 4 CR3 targets"
        );
        let bitmap = self.get(Field::MsrBitmap);
        require!(
            self,
            !proc.contains(Proc::MSR_BITMAPS) || (bitmap & 0xfff == 0 && self.is_physical(bitmap)),
            "MSR bitmap at {bitmap:#x}: not a physical page"
        );
        let (page, threshold) = (
            self.get(Field::VirtualApicAddress),
            self.get(Field::TprThreshold),
        );
        require!(
            self,
            !proc.contains(Proc::TPR_SHADOW)
                || (page & 0xfff == 0 && self.is_physical(page) && threshold < 16),
            "TPR shadow in {page:#x} with threshold {threshold}: no physical page, or above 15"
        );
        require!(
            self,
            pin.contains(Pin::NMI) || !pin.contains(Pin::VIRTUAL_NMIS),
            "virtual NMIs without NMI exiting"
        );
        require!(
            self,
            pin.contains(Pin::VIRTUAL_NMIS) || !proc.contains(Proc::NMI_WINDOW),
            "NMI-window exiting without virtual NMIs"
        );
        require!(
            self,
            !proc2.contains(Proc2::VPID) || self.get(Field::Vpid) != 0,
            "VPID 0 with VPIDs on"
        );
        require!(
            self,
            proc2.contains(Proc2::EPT) || !proc2.contains(Proc2::UNRESTRICTED_GUEST),
            "unrestricted guest without EPT"
        );
        require!(
            self,
            !proc2.contains(Proc2::TSC_SCALING) || self.get(Field::TscMultiplier) != 0,
            "TSC scaling by 0"
        );
        if proc2.contains(Proc2::EPT) {
            let eptp = self.get(Field::EptPointer);
            let type_ok = match eptp & 7 {
                0 => true,
                6 => c.ept_vpid.contains(EptVpid::WRITE_BACK),
                _ => false,
            };
            require!(
                self,
                type_ok && eptp >> 3 & 7 == 3 && eptp & 0xf80 == 0 && self.is_physical(eptp),
                "EPT pointer {eptp:#x}: memory type, walk length or a reserved bit"
            );
        }
    }

    /// Event injection: SDM vol. 3C, section 27.2.1.3.
    fn injection(&mut self) {
        const ERROR_CODE_VECTORS: [u8; 7] = [8, 10, 11, 12, 13, 14, 17];
        let Some(info) = self.injected() else { return };
        let (kind, vector) = (info.kind(), info.vector());
        require!(self, kind != 1 && kind != 7, "injection of type {kind}");
        require!(
            self,
            info.0 & 0x7fff_f000 == 0,
            "reserved bits in the injected event {:#x}",
            info.0
        );
        require!(
            self,
            !info.is_nmi() || vector == 2,
            "NMI injected with vector {vector}"
        );
        let hardware = kind == 3;
        require!(
            self,
            !hardware || vector < 32,
            "exception injected with vector {vector}"
        );
        let protected = self.get(Field::GuestCr0) & CR0_PE != 0;
        let wants_code =
            hardware && ERROR_CODE_VECTORS.contains(&vector) && (protected || !self.unrestricted());
        require!(
            self,
            info.has_error_code() == wants_code,
            "exception {vector} injected {} error code",
            if wants_code { "without its" } else { "with an" }
        );
        let code = self.get32(Field::EntryExceptionErrorCode);
        require!(
            self,
            !info.has_error_code() || code & 0xffff_0000 == 0,
            "injected error code {code:#x} is wider than 16 bits"
        );
        let length = self.get(Field::EntryInstructionLength);
        let shortest = u64::from(!self.capabilities.zero_length_injection);
        require!(
            self,
            !info.is_software() || (shortest..=15).contains(&length),
            "software event injected with instruction length {length}"
        );
    }

    fn fixed(&mut self, name: &str, value: u64, fixed: Fixed) {
        require!(
            self,
            value & fixed.ones == fixed.ones && value & !fixed.may == 0,
            "{name} {value:#x}: must have {:#x}, may have {:#x}",
            fixed.ones,
            fixed.may
        );
    }

    /// SDM vol. 3C, sections 27.2.2 to 27.2.4.
    fn host(&mut self) {
        self.fixed("host CR0", self.get(Field::HostCr0), self.capabilities.cr0);
        self.fixed("host CR4", self.get(Field::HostCr4), self.capabilities.cr4);
        let cr3 = self.get(Field::HostCr3);
        require!(self, self.is_physical(cr3), "host CR3 {cr3:#x}: too wide");
        for (name, field) in [
            ("SYSENTER_ESP", Field::HostSysenterEsp),
            ("SYSENTER_EIP", Field::HostSysenterEip),
            ("FS base", Field::HostFsBase),
            ("GS base", Field::HostGsBase),
            ("TR base", Field::HostTrBase),
            ("GDTR base", Field::HostGdtrBase),
            ("IDTR base", Field::HostIdtrBase),
            ("RIP", Field::HostRip),
        ] {
            let value = self.get(field);
            require!(
                self,
                is_canonical(value),
                "host {name} {value:#x}: not canonical"
            );
        }
        for (name, field) in [
            ("ES", Field::HostEsSelector),
            ("CS", Field::HostCsSelector),
            ("SS", Field::HostSsSelector),
            ("DS", Field::HostDsSelector),
            ("FS", Field::HostFsSelector),
            ("GS", Field::HostGsSelector),
            ("TR", Field::HostTrSelector),
        ] {
            let value = self.get(field);
            require!(
                self,
                value & 7 == 0,
                "host {name} selector {value:#x}: RPL or TI set"
            );
            require!(
                self,
                value != 0 || !matches!(name, "CS" | "TR"),
                "host {name} selector is null"
            );
        }
        let pat = self.get(Field::HostPat);
        require!(self, is_pat(pat), "host PAT {pat:#x}");
        let exit = ExitControls::from_bits_retain(self.get32(Field::ExitControls));
        let host_64 = exit.contains(ExitControls::HOST_64);
        let efer = self.get(Field::HostEfer);
        require!(
            self,
            efer & !EFER_DEFINED == 0
                && (efer & EFER_LMA != 0) == host_64
                && (efer & EFER_LME != 0) == host_64,
            "host EFER {efer:#x}: reserved bits, or not the mode of the VM-exit controls"
        );
        require!(
            self,
            !host_64 || self.get(Field::HostCr4) & CR4_PAE != 0,
            "64-bit host without CR4.PAE"
        );
    }

    /// SDM vol. 3C, section 27.3.1.1.
    fn guest_control_registers(&mut self) {
        let (cr0, cr4) = (self.get(Field::GuestCr0), self.get(Field::GuestCr4));
        let (cr3, efer) = (self.get(Field::GuestCr3), self.get(Field::GuestEfer));
        let mut fixed = self.capabilities.cr0;
        fixed.may |= CR0_NW_CD;
        if self.unrestricted() {
            fixed.ones &= !Capabilities::CR0_UNRESTRICTED;
        }
        self.fixed("guest CR0", cr0, fixed);
        require!(
            self,
            cr0 & CR0_PG == 0 || cr0 & CR0_PE != 0,
            "guest CR0 {cr0:#x}: paging without protection"
        );
        self.fixed("guest CR4", cr4, self.capabilities.cr4);
        let ia32e = self.ia32e();
        require!(
            self,
            !ia32e || (cr0 & CR0_PG != 0 && cr4 & CR4_PAE != 0),
            "IA-32e mode guest without CR0.PG and CR4.PAE"
        );
        require!(
            self,
            ia32e || cr4 & CR4_PCIDE == 0,
            "CR4.PCIDE outside IA-32e mode"
        );
        require!(self, self.is_physical(cr3), "guest CR3 {cr3:#x}: too wide");
        require!(
            self,
            efer & !EFER_DEFINED == 0,
            "guest EFER {efer:#x}: reserved bits"
        );
        require!(
            self,
            (efer & EFER_LMA != 0) == ia32e,
            "guest EFER.LMA differs from the IA-32e mode entry control"
        );
        require!(
            self,
            cr0 & CR0_PG == 0 || (efer & EFER_LMA != 0) == (efer & EFER_LME != 0),
            "guest EFER.LMA differs from LME with paging on"
        );
        let dr7 = self.get(Field::GuestDr7);
        require!(self, dr7 >> 32 == 0, "guest DR7 {dr7:#x}: bits 63:32 set");
        let debugctl = self.get(Field::GuestDebugctl);
        require!(
            self,
            debugctl & !0xdfc3 == 0,
            "guest DEBUGCTL {debugctl:#x}: reserved bits"
        );
        let pat = self.get(Field::GuestPat);
        require!(self, is_pat(pat), "guest PAT {pat:#x}");
        for (name, field) in [
            ("SYSENTER_ESP", Field::GuestSysenterEsp),
            ("SYSENTER_EIP", Field::GuestSysenterEip),
        ] {
            let value = self.get(field);
            require!(
                self,
                is_canonical(value),
                "guest {name} {value:#x}: not canonical"
            );
        }
    }

    /// SDM vol. 3C, sections 27.3.1.2 and 27.3.1.3.
    fn guest_segments(&mut self) {
        use SegmentName::{Cs, Ds, Es, Fs, Gs, Ss};
        let v86 = self.get(Field::GuestRflags) & RFLAGS_VM != 0;
        for name in [Cs, Ss, Ds, Es, Fs, Gs] {
            if v86 {
                self.v86_segment(name);
            } else {
                self.segment(name);
            }
        }
        if !v86 {
            self.code_and_stack_privilege();
        }
        self.system_segments();
        for (name, base, limit) in [
            ("GDTR", Field::GuestGdtrBase, Field::GuestGdtrLimit),
            ("IDTR", Field::GuestIdtrBase, Field::GuestIdtrLimit),
        ] {
            let (base, limit) = (self.get(base), self.get(limit));
            require!(
                self,
                is_canonical(base),
                "guest {name} base {base:#x}: not canonical"
            );
            require!(
                self,
                limit >> 16 == 0,
                "guest {name} limit {limit:#x}: wider than 16 bits"
            );
        }
    }

    fn rights(&self, name: SegmentName) -> AccessRights {
        AccessRights::from(self.get32(SegmentFields::of(name).rights))
    }

    fn v86_segment(&mut self, name: SegmentName) {
        let f = SegmentFields::of(name);
        let (selector, base) = (self.get(f.selector), self.get(f.base));
        require!(
            self,
            base == selector << 4,
            "guest {name:?} in virtual-8086 mode: base {base:#x} is not selector {selector:#x} * 16"
        );
        require!(
            self,
            self.get(f.limit) == 0xffff && self.get(f.rights) == 0xf3,
            "guest {name:?} in virtual-8086 mode: limit is not 0xffff, or access rights not 0xf3"
        );
    }

    /// Granularity against limit, reserved bits: alike for all usable segments.
    fn descriptor(&mut self, name: SegmentName) {
        let rights = self.rights(name);
        let limit = self.get32(SegmentFields::of(name).limit);
        let raw = u32::from(rights);
        require!(self, rights.present(), "guest {name:?}: not present");
        require!(
            self,
            raw & 0xfffe_0f00 == 0,
            "guest {name:?}: reserved bits in access rights {raw:#x}"
        );
        require!(
            self,
            limit & 0xfff == 0xfff || !rights.granularity(),
            "guest {name:?}: limit {limit:#x} can't have G = 1"
        );
        require!(
            self,
            limit >> 20 == 0 || rights.granularity(),
            "guest {name:?}: limit {limit:#x} can't have G = 0"
        );
    }

    fn segment(&mut self, name: SegmentName) {
        use SegmentName::{Cs, Fs, Gs, Ss};
        const CODE: u8 = 1 << 3;
        const READABLE: u8 = 1 << 1;
        const ACCESSED: u8 = 1 << 0;
        let base = self.get(SegmentFields::of(name).base);
        let rights = self.rights(name);
        let usable = !rights.unusable();
        if matches!(name, Fs | Gs) {
            require!(
                self,
                is_canonical(base),
                "guest {name:?} base {base:#x}: not canonical"
            );
        } else {
            require!(
                self,
                base >> 32 == 0 || !(usable || name == Cs),
                "guest {name:?} base {base:#x}: wider than 32 bits"
            );
        }
        if name == Cs {
            require!(self, usable, "guest CS is unusable");
        }
        if !usable {
            return;
        }
        let kind = rights.kind();
        let kind_ok = match name {
            Cs => matches!(kind, 9 | 11 | 13 | 15) || (kind == 3 && self.unrestricted()),
            Ss => matches!(kind, 3 | 7),
            _ => kind & ACCESSED != 0 && (kind & CODE == 0 || kind & READABLE != 0),
        };
        require!(self, kind_ok, "guest {name:?}: type {kind}");
        require!(
            self,
            rights.code_or_data(),
            "guest {name:?}: a system segment"
        );
        if name == Cs {
            require!(
                self,
                !(self.ia32e() && rights.long() && rights.default_big()),
                "guest CS: both L and D"
            );
        }
        self.descriptor(name);
    }

    fn code_and_stack_privilege(&mut self) {
        let (cs, ss) = (self.rights(SegmentName::Cs), self.rights(SegmentName::Ss));
        let (cs_dpl, ss_dpl) = (cs.dpl(), ss.dpl());
        let ok = match cs.kind() {
            3 => cs_dpl == 0,
            9 | 11 => cs_dpl == ss_dpl,
            13 | 15 => cs_dpl <= ss_dpl,
            _ => true,
        };
        require!(
            self,
            ok,
            "guest CS: type {} with DPL {cs_dpl}, SS.DPL is {ss_dpl}",
            cs.kind()
        );
        let real = self.get(Field::GuestCr0) & CR0_PE == 0;
        require!(
            self,
            ss_dpl == 0 || !(real || cs.kind() == 3),
            "guest SS: DPL {ss_dpl} in real mode"
        );
        if !self.unrestricted() {
            let cs_rpl = self.get(Field::GuestCsSelector) & 3;
            let ss_rpl = self.get(Field::GuestSsSelector) & 3;
            require!(
                self,
                cs_rpl == ss_rpl && u64::from(ss_dpl) == ss_rpl,
                "guest SS: RPL {ss_rpl}, DPL {ss_dpl}, CS.RPL is {cs_rpl}"
            );
        }
    }

    fn system_segments(&mut self) {
        use SegmentName::{Ldtr, Tr};
        for name in [Tr, Ldtr] {
            let f = SegmentFields::of(name);
            let rights = self.rights(name);
            if name == Tr {
                require!(self, !rights.unusable(), "guest TR is unusable");
            }
            if rights.unusable() {
                continue;
            }
            let (selector, base) = (self.get(f.selector), self.get(f.base));
            require!(
                self,
                selector & 4 == 0,
                "guest {name:?} selector {selector:#x}: TI set"
            );
            require!(
                self,
                is_canonical(base),
                "guest {name:?} base {base:#x}: not canonical"
            );
            let kind = rights.kind();
            let kind_ok = match name {
                Tr => kind == 11 || (kind == 3 && !self.ia32e()),
                _ => kind == 2,
            };
            require!(
                self,
                kind_ok && !rights.code_or_data(),
                "guest {name:?}: access rights {:#x}",
                u32::from(rights)
            );
            self.descriptor(name);
        }
    }

    /// SDM vol. 3C, section 27.3.1.4.
    fn guest_rip_and_rflags(&mut self) {
        let (rip, rflags) = (self.get(Field::GuestRip), self.get(Field::GuestRflags));
        if self.ia32e() && self.rights(SegmentName::Cs).long() {
            require!(
                self,
                matches!(rip >> 48, 0 | 0xffff),
                "guest RIP {rip:#x}: bits 63:48 differ"
            );
        } else {
            require!(
                self,
                rip >> 32 == 0,
                "guest RIP {rip:#x}: bits 63:32 outside 64-bit mode"
            );
        }
        require!(
            self,
            rflags & RFLAGS_RESERVED == 0 && rflags & 2 != 0,
            "guest RFLAGS {rflags:#x}: reserved bits"
        );
        let protected = self.get(Field::GuestCr0) & CR0_PE != 0;
        require!(
            self,
            rflags & RFLAGS_VM == 0 || (protected && !self.ia32e()),
            "guest RFLAGS.VM in real or IA-32e mode"
        );
        let interrupt = self.injected().is_some_and(|info| info.kind() == 0);
        require!(
            self,
            !interrupt || rflags & RFLAGS_IF != 0,
            "interrupt injected with RFLAGS.IF = 0"
        );
    }

    /// SDM vol. 3C, section 27.3.1.5.
    fn guest_activity(&mut self) {
        let activity = self.get(Field::GuestActivity);
        let blocking = self.get32(Field::GuestInterruptibility);
        let shadow = blocking & (BLOCKED_BY_STI | BLOCKED_BY_MOV_SS);
        let rflags = self.get(Field::GuestRflags);
        require!(self, activity <= 3, "activity state {activity}");
        require!(
            self,
            activity != 1 || self.rights(SegmentName::Ss).dpl() == 0,
            "halted with SS.DPL above 0"
        );
        require!(
            self,
            shadow == 0 || activity == 0,
            "blocking by STI or MOV SS while not active"
        );
        require!(
            self,
            blocking & !0x1f == 0,
            "interruptibility state {blocking:#x}: reserved bits"
        );
        require!(
            self,
            shadow != BLOCKED_BY_STI | BLOCKED_BY_MOV_SS,
            "blocking by both STI and MOV SS"
        );
        require!(
            self,
            shadow & BLOCKED_BY_STI == 0 || rflags & RFLAGS_IF != 0,
            "blocking by STI with RFLAGS.IF = 0"
        );
        if let Some(info) = self.injected() {
            require!(
                self,
                info.kind() != 0 || shadow == 0,
                "interrupt injected while blocked by STI or MOV SS"
            );
            require!(
                self,
                !info.is_nmi() || shadow == 0,
                "NMI injected while blocked by STI or MOV SS"
            );
            require!(
                self,
                !info.is_nmi()
                    || !self.pin().contains(Pin::VIRTUAL_NMIS)
                    || blocking & BLOCKED_BY_NMI == 0,
                "NMI injected while NMIs are blocked"
            );
            require!(
                self,
                activity < 2,
                "event injected in activity state {activity}"
            );
        }
        let pending = self.get(Field::GuestPendingDebug);
        require!(
            self,
            pending & !0x1_500f == 0,
            "pending debug exceptions {pending:#x}: reserved bits"
        );
        if shadow != 0 || activity == 1 {
            let step =
                rflags & RFLAGS_TF != 0 && self.get(Field::GuestDebugctl) & DEBUGCTL_BTF == 0;
            require!(
                self,
                (pending & PENDING_DEBUG_BS != 0) == step,
                "pending debug exceptions {pending:#x}: BS does not match RFLAGS.TF and DEBUGCTL.BTF"
            );
        }
        let link = self.get(Field::VmcsLinkPointer);
        require!(
            self,
            link == u64::MAX,
            "VMCS link pointer {link:#x}: not all ones"
        );
    }

    /// SDM vol. 3C, section 27.3.1.6.
    fn guest_pdptes(&mut self) {
        let pae = self.get(Field::GuestCr0) & CR0_PG != 0
            && self.get(Field::GuestCr4) & CR4_PAE != 0
            && !self.ia32e();
        if !pae {
            return;
        }
        for (i, field) in super::vcpu::PDPTES.into_iter().enumerate() {
            let entry = self.get(field);
            require!(
                self,
                entry & 1 == 0 || (entry & 0x1e6 == 0 && self.is_physical(entry)),
                "PDPTE{i} {entry:#x}: reserved bits"
            );
        }
    }
}

#[cfg(test)]
mod tests;

//! A vCPU without hardware, for host tests: plain registers and a script of exits.

use alloc::{collections::VecDeque, string::String, vec::Vec};

use virt::{
    CpuState, DescriptorTable, Event, Exit, Gpr, Registers, Segment, SegmentName, Shadow, TscScale,
    VirtualCpu,
};

/// Registers, the exits to give, and what was asked of it.
pub(crate) struct FakeCpu {
    pub state: CpuState,
    /// Then, the deadline comes again and again.
    pub exits: VecDeque<Exit>,
    pub entries: u32,
    /// Length that `skip_instruction(None)` steps over.
    pub length: u8,
    pub injected: Vec<Event>,
    pub queued: Option<Event>,
    /// Events whose delivery the next exits interrupt.
    pub interrupted: VecDeque<Event>,
    pub window: bool,
    /// Task priority and threshold, if CR8 is virtualized.
    pub priority: Option<(u8, u8)>,
    pub tsc_scale: TscScale,
    pub tsc_offset: u64,
    pub shadow: bool,
    pub nmis_blocked: bool,
    /// Host TSC of the deadline.
    pub deadline: u64,
    pub vectors: [[u8; 32]; 16],
    pub mmx: [u64; 8],
    /// As FXSAVE64 stores it.
    pub fpu: [u8; 512],
}

impl FakeCpu {
    pub fn new(state: CpuState) -> Self {
        FakeCpu {
            state,
            exits: VecDeque::new(),
            entries: 0,
            length: 2,
            injected: Vec::new(),
            queued: None,
            interrupted: VecDeque::new(),
            window: false,
            priority: None,
            tsc_scale: TscScale::SAME,
            tsc_offset: 0,
            shadow: false,
            nmis_blocked: false,
            deadline: 0,
            vectors: [[0; 32]; 16],
            mmx: [0; 8],
            fpu: [0; 512],
        }
    }

    /// A vCPU in 64-bit mode with paging as given by `cr3`.
    pub fn long_mode(rip: u64, cr3: u64) -> Self {
        let mut state = CpuState::reset();
        state.rip = rip;
        state.cr0 = 0x8000_0011;
        state.cr3 = cr3;
        state.cr4 = 1 << 5;
        state.efer = (1 << 8) | (1 << 10);
        state.segments = [Segment {
            base: 0,
            limit: u32::MAX,
            ..state.segments[0]
        }; 8];
        let cs = &mut state.segments[SegmentName::Cs as usize];
        cs.rights = cs.rights.with_kind(0xb).with_long(true);
        FakeCpu::new(state)
    }
}

impl Registers for FakeCpu {
    fn gpr(&self, gpr: Gpr) -> u64 {
        self.state.gprs[gpr as usize]
    }
    fn set_gpr(&mut self, gpr: Gpr, value: u64) {
        self.state.gprs[gpr as usize] = value;
    }
    fn rip(&self) -> u64 {
        self.state.rip
    }
    fn set_rip(&mut self, rip: u64) {
        self.state.rip = rip;
    }
    fn rflags(&self) -> u64 {
        self.state.rflags
    }
    fn set_rflags(&mut self, rflags: u64) {
        self.state.rflags = rflags;
    }
    fn segment(&self, name: SegmentName) -> Segment {
        self.state.segments[name as usize]
    }
    fn set_segment(&mut self, name: SegmentName, segment: Segment) {
        self.state.segments[name as usize] = segment;
    }
    fn cr0(&self) -> u64 {
        self.state.cr0
    }
    fn set_cr0(&mut self, value: u64) {
        self.state.cr0 = value;
        if value & self.state.efer << 23 & (1 << 31) != 0 {
            self.state.efer |= 1 << 10;
        } else {
            self.state.efer &= !(1 << 10);
        }
    }
    fn cr2(&self) -> u64 {
        self.state.cr2
    }
    fn set_cr2(&mut self, value: u64) {
        self.state.cr2 = value;
    }
    fn cr3(&self) -> u64 {
        self.state.cr3
    }
    fn set_cr3(&mut self, value: u64) {
        self.state.cr3 = value;
    }
    fn cr4(&self) -> u64 {
        self.state.cr4
    }
    fn set_cr4(&mut self, value: u64) {
        self.state.cr4 = value;
    }
    fn efer(&self) -> u64 {
        self.state.efer
    }
    fn set_efer(&mut self, value: u64) {
        self.state.efer = value;
    }
    fn dr6(&self) -> u64 {
        self.state.dr6
    }
    fn set_dr6(&mut self, value: u64) {
        self.state.dr6 = value;
    }
    fn dr7(&self) -> u64 {
        self.state.dr7
    }
    fn set_dr7(&mut self, value: u64) {
        self.state.dr7 = value;
    }
    fn breakpoints(&self) -> [u64; 4] {
        self.state.dr
    }
    fn set_breakpoints(&mut self, addresses: [u64; 4]) {
        self.state.dr = addresses;
    }
    fn gdtr(&self) -> DescriptorTable {
        self.state.gdtr
    }
    fn idtr(&self) -> DescriptorTable {
        self.state.idtr
    }
    fn set_gdtr(&mut self, table: DescriptorTable) {
        self.state.gdtr = table;
    }
    fn set_idtr(&mut self, table: DescriptorTable) {
        self.state.idtr = table;
    }
    fn vector(&mut self, number: u8) -> [u8; 32] {
        self.vectors[usize::from(number)]
    }
    fn set_vector(&mut self, number: u8, value: &[u8; 32]) {
        self.vectors[usize::from(number)] = *value;
    }
    fn mmx(&mut self, number: u8) -> u64 {
        self.mmx[usize::from(number)]
    }
    fn set_mmx(&mut self, number: u8, value: u64) {
        self.mmx[usize::from(number)] = value;
    }
    fn legacy_fpu(&mut self) -> [u8; 512] {
        self.fpu
    }
    fn set_legacy_fpu(&mut self, image: &[u8; 512]) {
        self.fpu = *image;
    }
    fn pkru(&self) -> u32 {
        0
    }
    fn xcr0(&self) -> u64 {
        self.state.xcr0
    }
    fn set_xcr0(&mut self, value: u64) {
        self.state.xcr0 = value;
    }
    fn state(&self) -> CpuState {
        self.state.clone()
    }
    fn set_state(&mut self, state: &CpuState) {
        self.state = state.clone();
    }
    fn msr(&self, _number: u32) -> Option<u64> {
        None
    }
    fn set_msr(&mut self, _number: u32, _value: u64) -> bool {
        false
    }
}

impl VirtualCpu for FakeCpu {
    const LOADS_PDPTES: bool = true;

    fn load(&mut self, _cpu: usize) {}
    fn unload(&mut self) {}
    fn enter(&mut self) -> Exit {
        if let Some(event) = self.queued.take() {
            self.injected.push(event);
        }
        self.entries += 1;
        self.queued = self.interrupted.pop_front();
        self.exits.pop_front().unwrap_or(Exit::Deadline)
    }
    fn set_tsc_scale(&mut self, scale: TscScale) {
        self.tsc_scale = scale;
    }
    fn set_tsc_offset(&mut self, offset: u64) {
        self.tsc_offset = offset;
    }
    fn skip_instruction(&mut self, length: Option<u8>) {
        self.state.rip += u64::from(length.unwrap_or(self.length));
        self.shadow = false;
    }
    fn begin_shadow(&mut self, _shadow: Shadow) {
        self.shadow = true;
    }
    fn unblock_nmis(&mut self) {
        self.nmis_blocked = false;
    }
    fn instruction_bytes(&self) -> &[u8] {
        &[]
    }
    fn interrupt_ready(&self) -> bool {
        self.state.rflags & (1 << 9) != 0 && !self.shadow && self.queued.is_none()
    }
    fn nmi_ready(&self) -> bool {
        self.queued.is_none() && !self.nmis_blocked
    }
    fn inject(&mut self, event: Event) {
        self.queued = Some(event);
    }
    fn queued(&self) -> Option<Event> {
        self.queued
    }
    fn cancel_injection(&mut self) {
        self.queued = None;
    }
    fn task_priority(&self) -> Option<u8> {
        self.priority.map(|(tpr, _)| tpr)
    }
    fn set_task_priority(&mut self, tpr: u8, threshold: u8) {
        self.priority = self.priority.and(Some((tpr, threshold)));
    }
    fn request_interrupt_window(&mut self, on: bool) {
        self.window = on;
    }
    fn request_nmi_window(&mut self, _on: bool) {}
    fn set_deadline(&mut self, host_tsc: u64) -> bool {
        self.deadline = host_tsc;
        true
    }
    fn flush_guest_tlb(&mut self) {}
    fn explain_entry_failure(&self) -> String {
        String::from("a fake has no entry checks")
    }
}

impl Default for FakeCpu {
    fn default() -> Self {
        let mut state = CpuState::reset();
        state.gdtr = DescriptorTable::default();
        FakeCpu::new(state)
    }
}

//! The register file of one local APIC, owned by its vCPU.

use alloc::sync::Arc;

use mem::Width;

use super::bus::ApicBus;
use super::inbox::{ApicInbox, Identity, Signals, Taken, VECTOR_WORDS, x2apic_logical_id};
use super::message::{DeliveryMode, Destination, Message, Trigger};
use super::registers::{
    ApicBase, Errors, Icr, Lvt, LvtEntry, MSR_APIC_BASE, MSR_TSC_DEADLINE, Register, Shorthand,
    Svr, TimerMode, Version, X2APIC_MSRS, XAPIC_BASE,
};
use crate::VcpuId;
use crate::bus::IoError;
use crate::time::{Clock, MIN_INTERRUPT_PERIOD_US, Rate, scale};

/// What a local APIC is made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalApicConfig {
    /// APIC ID; the same as in the [`ApicBus`].
    pub apic_id: u32,
    /// x2APIC is offered (CPUID.1:ECX[21]).
    pub x2apic: bool,
    /// TSC-deadline mode is offered (CPUID.1:ECX[24]).
    pub tsc_deadline: bool,
    /// Input clock of the timer in Hz, before the divider.
    pub timer_hz: u64,
    /// Physical-address bits of the guest's processor, for reserved bits of IA32_APIC_BASE.
    pub physical_bits: u8,
}

impl LocalApicConfig {
    /// A current processor: x2APIC, TSC-deadline, a 1 GHz timer clock, 40 physical-address bits.
    pub const fn new(apic_id: u32) -> Self {
        LocalApicConfig {
            apic_id,
            x2apic: true,
            tsc_deadline: true,
            timer_hz: 1_000_000_000,
            physical_bits: 40,
        }
    }
}

/// The access is a general-protection fault: the VMM injects #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrFault;

/// What a register write asks of the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a level-triggered line stays blocked if its EOI is dropped"]
pub enum ApicEffect {
    /// Nothing more.
    None,
    /// A level-triggered interrupt of this vector ended: tell the IOAPICs.
    EoiBroadcast(u8),
    /// IA32_APIC_BASE changed: xAPIC page, mode, or on/off. Adjust what is intercepted.
    BaseChanged,
}

/// 256 bits, one per vector.
#[derive(Clone, Copy, Default)]
struct VectorSet([u64; VECTOR_WORDS]);

impl VectorSet {
    fn set(&mut self, vector: u8) {
        self.0[usize::from(vector / 64)] |= 1 << (vector % 64);
    }

    fn clear(&mut self, vector: u8) {
        self.0[usize::from(vector / 64)] &= !(1 << (vector % 64));
    }

    fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector / 64)] & (1 << (vector % 64)) != 0
    }

    /// As one of the registers has it, 0 to 7.
    fn register(&self, number: u8) -> u32 {
        half(self.0[usize::from((number / 2) & 3)], number)
    }

    #[inline(always)]
    fn highest(&self) -> Option<u8> {
        // At each look for interrupts, and most often there is none.
        let [a, b, c, d] = self.0;
        if a | b | c | d == 0 {
            return None;
        }
        let (first, word) = match (d, c, b) {
            (1.., _, _) => (192, d),
            (0, 1.., _) => (128, c),
            (0, 0, 1..) => (64, b),
            (0, 0, 0) => (0, a),
        };
        Some(first + word.checked_ilog2()? as u8)
    }
}

/// The half of a word of vectors that one of the eight registers shows.
fn half(word: u64, register: u8) -> u32 {
    (word >> (32 * u32::from(register % 2))) as u32
}

/// DFR model: flat. Any other value selects the cluster model (section 11.6.2.2).
const MODEL_FLAT: u8 = 0xf;

/// The timer's counter. Times are in counts of the input clock (before the divider).
#[derive(Clone, Copy)]
struct Timer {
    rate: Rate,
    initial: u32,
    divide_bits: u8,
    /// Count at which the current count reaches zero; `None`: stopped.
    expiry: Option<u64>,
    /// The tick at which `expiry` or `tsc_deadline` is due; kept so that reading it is cheap.
    due: Option<u64>,
    /// IA32_TSC_DEADLINE; 0: disarmed.
    tsc_deadline: u64,
    /// Periodic interrupts are not delivered before this tick (see [`MIN_INTERRUPT_PERIOD_US`]).
    not_before: u64,
    /// A periodic interrupt waits for `not_before`.
    owed: bool,
}

impl Timer {
    fn new(rate: Rate) -> Self {
        Timer {
            rate,
            initial: 0,
            divide_bits: 0,
            expiry: None,
            due: None,
            tsc_deadline: 0,
            not_before: 0,
            owed: false,
        }
    }

    /// Divisor of the divide configuration register (SDM vol. 3A, figure 11-10).
    fn divisor(&self) -> u64 {
        let code = (self.divide_bits & 3) | ((self.divide_bits & 8) >> 1);
        1 << ((code + 1) & 7)
    }

    fn period(&self) -> u64 {
        u64::from(self.initial) * self.divisor()
    }

    fn arm(&mut self, now: u64, counts: u64) {
        self.expiry = Some(self.rate.count_at(now).saturating_add(counts));
        self.due = self.expiry.map(|e| self.rate.tick_of(e));
    }

    fn disarm(&mut self) {
        self.expiry = None;
        self.due = None;
        self.tsc_deadline = 0;
        self.owed = false;
    }

    /// Moves a periodic timer's expiry past tick `now`, over however many periods were missed.
    fn next_period(&mut self, now: u64) {
        let period = self.period();
        let (Some(expiry), true) = (self.expiry, period != 0) else {
            self.disarm();
            return;
        };
        let periods = self.rate.count_at(now).saturating_sub(expiry) / period + 1;
        let next = expiry.saturating_add(periods.saturating_mul(period));
        self.expiry = Some(next);
        self.due = Some(self.rate.tick_of(next));
    }

    /// The current count at tick `now`, also if the expiry was not acted on yet.
    fn current(&self, now: u64, mode: TimerMode) -> u32 {
        let count = self.rate.count_at(now);
        let left = match self.expiry {
            None => 0,
            Some(expiry) if count < expiry => expiry - count,
            Some(expiry) => match (mode, self.period()) {
                (TimerMode::Periodic, period @ 1..) => period - (count - expiry) % period,
                _ => 0,
            },
        };
        u32::try_from(left.div_ceil(self.divisor())).unwrap_or(u32::MAX)
    }
}

/// The local APIC of one vCPU (SDM vol. 3A, chapter 11).
///
/// Ticks in and out (`now`, [`LocalApic::deadline`]) are those of the VM's [`Clock`];
/// IA32_TSC_DEADLINE is in the vCPU's own TSC, which differs by [`LocalApic::set_tsc_adjust`].
pub struct LocalApic {
    config: LocalApicConfig,
    bus: Arc<ApicBus>,
    inbox: Arc<ApicInbox>,
    clock: Arc<dyn Clock>,

    base: ApicBase,
    /// xAPIC ID; the x2APIC's is that of `config`.
    xapic_id: u8,
    tpr: u8,
    /// xAPIC logical ID.
    logical: u8,
    /// xAPIC destination model: the high nibble of DFR.
    model: u8,
    svr: Svr,
    esr: Errors,
    new_errors: Errors,
    icr: Icr,
    lvt: [Lvt; LvtEntry::COUNT],
    irr: VectorSet,
    isr: VectorSet,
    tmr: VectorSet,
    timer: Timer,
    /// The vCPU's TSC minus the VM clock, wrapping.
    tsc_adjust: u64,
    /// Signals drained along with interrupts, kept for [`LocalApic::take_signals`].
    signals: Signals,
    /// An ExtINT message came: the next interrupt acknowledge is the 8259A's.
    extint: bool,
    /// Interrupts accepted for service, for statistics.
    accepted: u64,
}

impl LocalApic {
    /// The local APIC of `vcpu` after power-up: on, in xAPIC mode, software-disabled.
    ///
    /// `None` if `bus` has no such vCPU. vCPU 0 is the bootstrap processor.
    pub fn new(
        vcpu: VcpuId,
        config: LocalApicConfig,
        bus: Arc<ApicBus>,
        clock: Arc<dyn Clock>,
    ) -> Option<Self> {
        let inbox = bus.inbox(vcpu)?.clone();
        let timer = Timer::new(Rate::new(clock.hz(), config.timer_hz));
        let mut apic = LocalApic {
            config,
            bus,
            inbox,
            clock,
            base: ApicBase::new()
                .with_page(XAPIC_BASE >> 12)
                .with_enabled(true)
                .with_bsp(vcpu == VcpuId(0)),
            xapic_id: config.apic_id as u8,
            tpr: 0,
            logical: 0,
            model: MODEL_FLAT,
            svr: Svr::new().with_vector(0xff),
            esr: Errors::empty(),
            new_errors: Errors::empty(),
            icr: Icr::new(),
            lvt: [Lvt::new().with_masked(true); LvtEntry::COUNT],
            irr: VectorSet::default(),
            isr: VectorSet::default(),
            tmr: VectorSet::default(),
            timer,
            tsc_adjust: 0,
            signals: Signals::default(),
            extint: false,
            accepted: 0,
        };
        apic.publish();
        Some(apic)
    }

    /// The registers after INIT: as after power-up, but IA32_APIC_BASE and the APIC ID stay (section
    /// 11.4.7.3).
    ///
    /// A start-up IPI that followed the INIT stays in the inbox.
    pub fn init(&mut self) {
        self.tpr = 0;
        self.logical = 0;
        self.model = MODEL_FLAT;
        self.svr = Svr::new().with_vector(0xff);
        self.esr = Errors::empty();
        self.new_errors = Errors::empty();
        self.icr = Icr::new();
        self.lvt = [Lvt::new().with_masked(true); LvtEntry::COUNT];
        self.irr = VectorSet::default();
        self.isr = VectorSet::default();
        self.tmr = VectorSet::default();
        self.timer = Timer::new(self.timer.rate);
        self.extint = false;
        self.publish();
    }

    /// Leaves the APIC as firmware hands a bootstrap processor to an operating system: on, the
    /// 8259A through LINT0 (virtual wire mode), NMI on LINT1 (MP specification, section 3.6.2.2).
    pub fn set_virtual_wire(&mut self) {
        self.svr.set_enabled(true);
        self.lvt[LvtEntry::Lint0 as usize] =
            Lvt::new().with_mode_bits(DeliveryMode::ExtInt.into_bits());
        self.lvt[LvtEntry::Lint1 as usize] =
            Lvt::new().with_mode_bits(DeliveryMode::Nmi.into_bits());
        self.publish();
    }

    /// This APIC's inbox.
    pub fn inbox(&self) -> &Arc<ApicInbox> {
        &self.inbox
    }

    /// IA32_APIC_BASE.
    pub fn base(&self) -> ApicBase {
        self.base
    }

    /// Guest-physical address of the xAPIC page; `None` when off or in x2APIC mode.
    pub fn xapic_page(&self) -> Option<u64> {
        (self.base.enabled() && !self.base.x2apic()).then(|| self.base.address())
    }

    /// Whether the registers are MSRs.
    pub fn is_x2apic(&self) -> bool {
        self.base.enabled() && self.base.x2apic()
    }

    /// Interrupts accepted since the VM started.
    pub fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Sets the vCPU's TSC minus the VM's clock, in ticks, wrapping. Re-arms a TSC deadline.
    pub fn set_tsc_adjust(&mut self, adjust: u64) {
        self.tsc_adjust = adjust;
        if self.timer.tsc_deadline != 0 {
            self.timer.due = Some(self.deadline_tick(self.timer.tsc_deadline));
        }
    }

    // --- interrupts to the processor -------------------------------------------------------

    /// Whether [`LocalApic::take_signals`] has something. Vectored interrupts are drained on the way.
    #[inline]
    pub fn has_signals(&mut self) -> bool {
        self.drain();
        !self.signals.is_empty()
    }

    /// Takes the signals posted since the last call. Vectored interrupts are drained on the way.
    pub fn take_signals(&mut self) -> Signals {
        self.drain();
        core::mem::take(&mut self.signals)
    }

    /// The vector to inject next: the highest request above the processor priority.
    ///
    /// Stays requested until [`LocalApic::accept`].
    pub fn interrupt(&mut self) -> Option<u8> {
        self.drain();
        if !self.base.enabled() {
            return None;
        }
        let vector = self.irr.highest()?;
        (vector >> 4 > self.ppr() >> 4).then_some(vector)
    }

    /// The processor took `vector`: from requested to in service (section 11.8.4).
    pub fn accept(&mut self, vector: u8) {
        self.irr.clear(vector);
        self.isr.set(vector);
        self.accepted = self.accepted.wrapping_add(1);
    }

    /// Whether the next interrupt is the 8259A's, `intr` telling its output: it reaches the processor when
    /// the APIC is off, through LINT0 as ExtINT, or as an ExtINT message.
    pub fn wants_extint(&self, intr: impl FnOnce() -> bool) -> bool {
        let lint0 = self.lvt[LvtEntry::Lint0 as usize];
        let open = !lint0.masked() && lint0.mode() == DeliveryMode::ExtInt;
        self.extint || ((open || !self.base.enabled()) && intr())
    }

    /// The processor asked the 8259A for the vector to take.
    pub fn accept_extint(&mut self) {
        self.extint = false;
    }

    /// Processor priority (section 11.8.3.1).
    pub fn ppr(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0);
        if self.tpr >> 4 >= in_service >> 4 {
            self.tpr
        } else {
            in_service & 0xf0
        }
    }

    /// The priority class of the highest request that the task priority holds back; 0 if it holds none back.
    pub fn withheld(&self) -> u8 {
        let class = self.tpr >> 4;
        if class == 0 {
            return 0;
        }
        let request = self.irr.highest().unwrap_or(0) >> 4;
        if request <= class { request } else { 0 }
    }

    /// Task priority.
    pub fn tpr(&self) -> u8 {
        self.tpr
    }

    /// Sets the task priority.
    pub fn set_tpr(&mut self, tpr: u8) {
        self.tpr = tpr;
        self.inbox.publish_priority(tpr);
    }

    /// CR8: the task-priority class (section 11.8.6).
    pub fn cr8(&self) -> u64 {
        u64::from(self.tpr >> 4)
    }

    /// MOV to CR8; values above 15 are #GP.
    pub fn set_cr8(&mut self, value: u64) -> Result<(), MsrFault> {
        if value > 15 {
            return Err(MsrFault);
        }
        self.set_tpr((value as u8) << 4);
        Ok(())
    }

    /// Takes over what was posted. Most often nothing was, and this is on the way of many exits.
    #[inline]
    fn drain(&mut self) {
        if self.inbox.has_pending() {
            self.drain_posted();
        }
    }

    #[inline(never)]
    fn drain_posted(&mut self) {
        let taken = self.inbox.take();
        if taken.has_interrupts() {
            for word in 0..self.irr.0.len() {
                let (irr, tmr) = self.inbox.take_word(word);
                if irr != 0 {
                    self.tmr.0[word] = (self.tmr.0[word] & !irr) | tmr;
                    self.irr.0[word] |= irr;
                }
            }
        }
        if taken.has_more() {
            self.drain_signals(taken);
        }
    }

    /// What was posted beside vectored interrupts.
    #[inline(never)]
    fn drain_signals(&mut self, taken: Taken) {
        if taken.has_illegal_vector() {
            self.raise_error(Errors::RECEIVE_ILLEGAL_VECTOR);
        }
        // As ExtINT, LINT0 is a level, and the 8259A is asked for it.
        if taken.has_intr() && self.lvt[LvtEntry::Lint0 as usize].mode() != DeliveryMode::ExtInt {
            self.local_event(LvtEntry::Lint0);
        }
        self.extint |= taken.has_extint();
        let Signals {
            nmis,
            init,
            startup,
        } = taken.signals();
        self.signals.add_nmis(nmis);
        if init {
            // A start-up IPI from before this INIT is void.
            self.signals.init = true;
            self.signals.startup = None;
        }
        self.signals.startup = self.signals.startup.or(startup);
    }

    fn request(&mut self, vector: u8, trigger: Trigger) {
        self.irr.set(vector);
        match trigger {
            Trigger::Edge => self.tmr.clear(vector),
            Trigger::Level => self.tmr.set(vector),
        }
    }

    /// An event of a local source. LINT pins and the others share this path (section 11.5.1).
    fn local_event(&mut self, entry: LvtEntry) {
        let lvt = self.lvt[entry as usize];
        if lvt.masked() || !self.base.enabled() {
            return;
        }
        match lvt.mode() {
            DeliveryMode::Fixed if lvt.vector() >= 16 => {
                self.request(lvt.vector(), Trigger::Edge);
            }
            // An error entry with a bad vector is recorded as well, but signals nothing: the error before
            // it has disarmed it.
            DeliveryMode::Fixed => self.raise_error(Errors::RECEIVE_ILLEGAL_VECTOR),
            DeliveryMode::Nmi => self.signals.add_nmis(1),
            DeliveryMode::Init => self.signals.init = true,
            // ExtINT is the PIC's affair; SMI has nowhere to go; the rest is reserved here.
            DeliveryMode::ExtInt
            | DeliveryMode::Smi
            | DeliveryMode::LowestPriority
            | DeliveryMode::StartUp
            | DeliveryMode::Reserved => {}
        }
    }

    /// Notes an error. The first since the last write to ESR interrupts (section 11.5.3).
    /// Whether an error waits to be shown in the ESR: its interrupt may have been requested.
    #[inline]
    pub fn has_new_errors(&self) -> bool {
        !self.new_errors.is_empty()
    }

    fn raise_error(&mut self, error: Errors) {
        let armed = self.new_errors.is_empty();
        self.new_errors |= error;
        if armed {
            self.local_event(LvtEntry::Error);
        }
    }

    /// A performance-counter overflow: delivers through the performance LVT entry and masks it
    /// (section 11.5.1).
    pub fn performance_event(&mut self) {
        self.local_event(LvtEntry::Performance);
        self.lvt[LvtEntry::Performance as usize].set_masked(true);
    }

    // --- registers -------------------------------------------------------------------------

    /// Reads the xAPIC page: `offset` in bytes, at multiples of 16 (section 11.4.1).
    ///
    /// A reserved register reads 0 and sets an error bit. Only 32-bit reads are defined; narrower ones
    /// within a register get their part of it, as processors give it.
    pub fn read_mmio(&mut self, offset: u64, width: Width) -> Result<u32, IoError> {
        let within = (offset % 16) as usize;
        if width == Width::Qword {
            return Err(IoError::InvalidWidth);
        }
        if within + width.bytes() > 4 {
            return Err(IoError::Unaligned);
        }
        let number = u8::try_from(offset / 16).map_err(|_| IoError::InvalidRegister)?;
        let value = match Register::from_number(number) {
            Some(Register::SelfIpi) | None => {
                self.raise_error(Errors::ILLEGAL_REGISTER);
                0
            }
            // Write-only.
            Some(Register::Eoi) => 0,
            Some(register) => self.read(register),
        };
        Ok((value >> (8 * within)) & width.mask() as u32)
    }

    /// Writes the xAPIC page: `offset` in bytes, 32-bit accesses at multiples of 16.
    ///
    /// Reserved bits are ignored; a reserved register sets an error bit.
    pub fn write_mmio(
        &mut self,
        offset: u64,
        width: Width,
        value: u32,
    ) -> Result<ApicEffect, IoError> {
        if width != Width::Dword {
            return Err(IoError::InvalidWidth);
        }
        if !offset.is_multiple_of(16) {
            return Err(IoError::Unaligned);
        }
        let number = u8::try_from(offset / 16).map_err(|_| IoError::InvalidRegister)?;
        match Register::from_number(number) {
            Some(Register::SelfIpi) | None => {
                self.raise_error(Errors::ILLEGAL_REGISTER);
                Ok(ApicEffect::None)
            }
            Some(register) => Ok(self.write(register, value)),
        }
    }

    /// Whether [`LocalApic::read_msr`] and [`LocalApic::write_msr`] answer for this MSR.
    pub fn owns_msr(number: u32) -> bool {
        number == MSR_APIC_BASE || number == MSR_TSC_DEADLINE || X2APIC_MSRS.contains(&number)
    }

    /// RDMSR of IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register (section 11.12.1.2).
    ///
    /// Changes nothing, so nothing new can be due after it.
    pub fn read_msr(&self, number: u32) -> Result<u64, MsrFault> {
        match number {
            MSR_APIC_BASE => Ok(self.base.into_bits()),
            MSR_TSC_DEADLINE if self.config.tsc_deadline => {
                let due = self.timer.due.is_some_and(|due| self.clock.now() >= due);
                Ok(if due { 0 } else { self.timer.tsc_deadline })
            }
            _ => match self.x2apic_register(number)? {
                Register::Id => Ok(u64::from(self.config.apic_id)),
                Register::Ldr => Ok(u64::from(x2apic_logical_id(self.config.apic_id))),
                Register::IcrLow => Ok(self.icr.into_bits()),
                Register::Eoi
                | Register::SelfIpi
                | Register::Dfr
                | Register::IcrHigh
                | Register::Apr
                | Register::Rrd => Err(MsrFault),
                register => Ok(u64::from(self.read(register))),
            },
        }
    }

    /// WRMSR of IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register. Reserved bits are #GP.
    pub fn write_msr(&mut self, number: u32, value: u64) -> Result<ApicEffect, MsrFault> {
        match number {
            MSR_APIC_BASE => return self.write_base(ApicBase::from_bits(value)),
            MSR_TSC_DEADLINE if self.config.tsc_deadline => {
                self.write_tsc_deadline(value);
                return Ok(ApicEffect::None);
            }
            _ => {}
        }
        let register = self.x2apic_register(number)?;
        if register == Register::IcrLow {
            let icr = Icr::from_bits(value);
            // Delivery status is reserved in x2APIC mode (figure 11-28).
            if value & !Icr::WRITABLE.into_bits() != 0 {
                return Err(MsrFault);
            }
            self.write_icr(icr);
            return Ok(ApicEffect::None);
        }
        let reserved = match register {
            Register::Tpr | Register::SelfIpi => !0xff,
            Register::Eoi | Register::Esr => !0,
            Register::Svr => !Svr::WRITABLE.into_bits(),
            Register::Lvt(entry) => !entry.writable(self.config.tsc_deadline).into_bits(),
            Register::TimerInitial => 0,
            Register::TimerDivide => !0b1011,
            // Read-only, or not a register in this mode.
            _ => return Err(MsrFault),
        };
        let value = u32::try_from(value).map_err(|_| MsrFault)?;
        if value & reserved != 0 {
            return Err(MsrFault);
        }
        if register == Register::SelfIpi {
            self.self_ipi(value as u8);
            return Ok(ApicEffect::None);
        }
        Ok(self.write(register, value))
    }

    fn x2apic_register(&self, number: u32) -> Result<Register, MsrFault> {
        if !self.is_x2apic() {
            return Err(MsrFault);
        }
        number
            .checked_sub(*X2APIC_MSRS.start())
            .and_then(|n| u8::try_from(n).ok())
            .and_then(Register::from_number)
            .ok_or(MsrFault)
    }

    fn read(&self, register: Register) -> u32 {
        match register {
            Register::Id => u32::from(self.xapic_id) << 24,
            Register::Version => Version::new()
                .with_version(0x14)
                .with_max_lvt(LvtEntry::COUNT as u8 - 1)
                .with_eoi_suppression(true)
                .into_bits(),
            Register::Tpr => u32::from(self.tpr),
            Register::Ppr => u32::from(self.ppr()),
            // Not implemented since the Pentium 4 (table 11-1, notes): zero.
            Register::Apr | Register::Rrd => 0,
            Register::Ldr => u32::from(self.logical) << 24,
            Register::Dfr => u32::from(self.model) << 28 | 0x0fff_ffff,
            Register::Svr => self.svr.into_bits(),
            Register::Isr(number) => self.isr.register(number),
            Register::Tmr(number) => {
                let (irr, tmr) = self.inbox.peek_word(usize::from((number / 2) & 3));
                (self.tmr.register(number) & !half(irr, number)) | half(tmr, number)
            }
            Register::Irr(number) => {
                let (irr, _) = self.inbox.peek_word(usize::from((number / 2) & 3));
                self.irr.register(number) | half(irr, number)
            }
            Register::Esr => self.esr.bits(),
            Register::IcrLow => self.icr.into_bits() as u32,
            Register::IcrHigh => self.icr.destination(),
            Register::Lvt(entry) => self.lvt[entry as usize].into_bits(),
            Register::TimerInitial => self.timer.initial,
            Register::TimerCurrent => self.timer.current(self.clock.now(), self.timer_mode()),
            Register::TimerDivide => u32::from(self.timer.divide_bits),
            // Write-only; both callers have answered already.
            Register::Eoi | Register::SelfIpi => 0,
        }
    }

    fn write(&mut self, register: Register, value: u32) -> ApicEffect {
        match register {
            Register::Eoi => return self.eoi(),
            Register::Tpr => self.set_tpr(value as u8),
            Register::Id => {
                // Only in xAPIC mode: WRMSR refuses it before it comes here.
                self.xapic_id = (value >> 24) as u8;
                self.publish();
                if u32::from(self.xapic_id) != self.config.apic_id {
                    self.bus.ids_changed();
                }
            }
            Register::Ldr => {
                self.logical = (value >> 24) as u8;
                self.publish();
            }
            Register::Dfr => {
                self.model = (value >> 28) as u8;
                self.publish();
            }
            Register::Svr => self.write_svr(value),
            Register::Esr => {
                // A write makes the errors since the last write visible (section 11.5.3).
                self.drain();
                self.esr = core::mem::take(&mut self.new_errors);
            }
            Register::IcrLow => {
                let icr = Icr::from_bits(u64::from(value) & Icr::WRITABLE.into_bits());
                self.write_icr(icr.with_destination(self.icr.destination()));
            }
            Register::IcrHigh => self.icr.set_destination(value & 0xff00_0000),
            Register::Lvt(entry) => self.write_lvt(entry, value),
            Register::TimerInitial => {
                if self.timer_mode() != TimerMode::TscDeadline {
                    let now = self.clock.now();
                    self.poll(now);
                    self.timer.initial = value;
                    match value {
                        0 => self.timer.disarm(),
                        _ => self.timer.arm(now, self.timer.period()),
                    }
                }
            }
            Register::TimerDivide => {
                let now = self.clock.now();
                self.poll(now);
                let current = self.timer.current(now, self.timer_mode());
                self.timer.divide_bits = value as u8 & 0b1011;
                if self.timer.expiry.is_some() {
                    // The count goes on from where it is, at the new pace.
                    self.timer
                        .arm(now, u64::from(current) * self.timer.divisor());
                }
            }
            // Read-only.
            Register::Version
            | Register::Apr
            | Register::Ppr
            | Register::Rrd
            | Register::Isr(_)
            | Register::Tmr(_)
            | Register::Irr(_)
            | Register::TimerCurrent
            | Register::SelfIpi => {}
        }
        ApicEffect::None
    }

    /// End of interrupt (section 11.8.5).
    pub fn eoi(&mut self) -> ApicEffect {
        let Some(vector) = self.isr.highest() else {
            return ApicEffect::None;
        };
        self.isr.clear(vector);
        if self.tmr.contains(vector) && !self.svr.suppress_eoi_broadcast() {
            ApicEffect::EoiBroadcast(vector)
        } else {
            ApicEffect::None
        }
    }

    fn write_svr(&mut self, value: u32) {
        self.svr = Svr::from_bits(value & Svr::WRITABLE.into_bits());
        if !self.svr.enabled() {
            // Software-disabled: every LVT entry is masked and stays so (section 11.4.7.2).
            for lvt in &mut self.lvt {
                lvt.set_masked(true);
            }
        }
        self.publish();
    }

    fn write_lvt(&mut self, entry: LvtEntry, value: u32) {
        let writable = entry.writable(self.config.tsc_deadline).into_bits();
        let mut lvt = Lvt::from_bits(value & writable);
        if !self.svr.enabled() {
            lvt.set_masked(true);
        }
        if entry == LvtEntry::Timer {
            // What is due under the old entry is delivered under the old entry.
            let now = self.clock.now();
            self.poll(now);
            let deadline_mode = |l: Lvt| l.timer_mode() == TimerMode::TscDeadline;
            if deadline_mode(lvt) != deadline_mode(self.lvt[LvtEntry::Timer as usize]) {
                self.timer.disarm();
            }
        }
        self.lvt[entry as usize] = lvt;
    }

    fn write_icr(&mut self, icr: Icr) {
        self.icr = icr;
        let mode = DeliveryMode::from_bits(icr.mode_bits());
        let vectored = matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority);
        if vectored && icr.vector() < 16 {
            self.raise_error(Errors::SEND_ILLEGAL_VECTOR);
            return;
        }
        let destination = match icr.shorthand() {
            Shorthand::Sender => {
                // Only vectors can be sent to oneself this way (table 11-3): not even an NMI.
                if vectored {
                    self.self_ipi(icr.vector());
                }
                return;
            }
            Shorthand::All => Destination::All,
            Shorthand::AllButSender => Destination::AllButSender,
            Shorthand::None if self.base.x2apic() => {
                Destination::wide(icr.destination(), icr.logical())
            }
            Shorthand::None => Destination::narrow((icr.destination() >> 24) as u8, icr.logical()),
        };
        // An ICR cannot send ExtINT (section 11.6.1).
        if matches!(mode, DeliveryMode::ExtInt | DeliveryMode::Reserved) {
            return;
        }
        let message = Message {
            destination,
            mode,
            vector: icr.vector(),
            // The trigger bit matters for INIT alone: IPIs are edge-triggered.
            trigger: Trigger::Edge,
            assert: mode != DeliveryMode::Init || icr.assert() || !icr.level(),
        };
        self.bus.send(&message, Some(self.inbox.vcpu()));
    }

    fn self_ipi(&mut self, vector: u8) {
        if vector < 16 {
            self.raise_error(Errors::SEND_ILLEGAL_VECTOR);
        } else if self.svr.enabled() {
            self.request(vector, Trigger::Edge);
        }
    }

    /// Mode changes (section 11.12.5, figure 11-27).
    fn write_base(&mut self, new: ApicBase) -> Result<ApicEffect, MsrFault> {
        if new == self.base {
            return Ok(ApicEffect::None);
        }
        let reserved_low = ApicBase::new()
            .with_bsp(true)
            .with_x2apic(self.config.x2apic)
            .with_enabled(true)
            .with_page((1 << (u32::from(self.config.physical_bits).clamp(12, 52) - 12)) - 1)
            .into_bits();
        if new.into_bits() & !reserved_low != 0 {
            return Err(MsrFault);
        }
        let state = |b: ApicBase| (b.enabled(), b.x2apic());
        match (state(self.base), state(new)) {
            // Not a state.
            (_, (false, true)) => return Err(MsrFault),
            // x2APIC is entered from xAPIC only, and left to off only.
            ((false, _), (true, true)) | ((true, true), (true, false)) => return Err(MsrFault),
            ((true, _), (false, false)) => {
                // Registers lose their state; on again, it is as after reset.
                self.base = new;
                self.xapic_id = self.config.apic_id as u8;
                self.init();
            }
            ((true, false), (true, true)) => {
                self.base = new;
                self.icr = self.icr.with_destination(0);
                self.publish();
            }
            _ => {
                self.base = new;
                self.publish();
            }
        }
        Ok(ApicEffect::BaseChanged)
    }

    fn publish(&mut self) {
        let x2apic = self.is_x2apic();
        self.inbox.publish(
            Identity::new()
                .with_id(if x2apic {
                    self.config.apic_id
                } else {
                    u32::from(self.xapic_id)
                })
                .with_logical(self.logical)
                .with_flat(self.model == MODEL_FLAT)
                .with_enabled(self.base.enabled())
                .with_x2apic(x2apic)
                .with_software_enabled(self.base.enabled() && self.svr.enabled()),
        );
        self.inbox.publish_priority(self.tpr);
    }

    // --- timer -----------------------------------------------------------------------------

    fn timer_mode(&self) -> TimerMode {
        self.lvt[LvtEntry::Timer as usize].timer_mode()
    }

    /// The clock's tick at which the vCPU's TSC reaches `tsc`, or did. The two are compared as the processor does, as
    /// plain numbers, wherever the guest has set its TSC.
    fn deadline_tick(&self, tsc: u64) -> u64 {
        let now = self.clock.now();
        let guest = now.wrapping_add(self.tsc_adjust);
        if tsc >= guest {
            now.saturating_add(tsc - guest)
        } else {
            now.saturating_sub(guest - tsc)
        }
    }

    fn write_tsc_deadline(&mut self, value: u64) {
        // Ignored in the other modes (section 11.5.4.1).
        if self.timer_mode() != TimerMode::TscDeadline {
            return;
        }
        self.timer.tsc_deadline = value;
        self.timer.due = (value != 0).then(|| self.deadline_tick(value));
    }

    /// The tick at which the timer next interrupts; `None` while it is stopped or masked.
    pub fn deadline(&self) -> Option<u64> {
        if self.lvt[LvtEntry::Timer as usize].masked() {
            return None;
        }
        if self.timer.owed {
            return Some(self.timer.not_before);
        }
        match (self.timer.due?, self.timer_mode()) {
            (due, TimerMode::Periodic) => Some(due.max(self.timer.not_before)),
            (due, _) => Some(due),
        }
    }

    /// Brings the timer to tick `now` and requests its interrupt if it expired. Missed periods coalesce.
    #[inline]
    pub fn poll(&mut self, now: u64) {
        let timer = &self.timer;
        if timer.due.is_some_and(|due| now >= due) || timer.owed && now >= timer.not_before {
            self.expire(now);
        }
    }

    #[inline(never)]
    fn expire(&mut self, now: u64) {
        if self.timer.due.is_some_and(|due| now >= due) {
            match self.timer_mode() {
                TimerMode::TscDeadline | TimerMode::OneShot => {
                    self.timer.disarm();
                    self.local_event(LvtEntry::Timer);
                }
                TimerMode::Periodic => {
                    self.timer.next_period(now);
                    self.timer.owed = true;
                }
            }
        }
        if self.timer.owed && now >= self.timer.not_before {
            self.timer.owed = false;
            let pause = scale(MIN_INTERRUPT_PERIOD_US, self.clock.hz(), 1_000_000);
            self.timer.not_before = now.saturating_add(pause);
            self.local_event(LvtEntry::Timer);
        }
    }
}

//! With the feature `selftest`: does what the ramdisk's file `selftest` says, and powers off. Without that
//! file an image that has a configuration runs its VMs as ever, and one that has none is as if the file
//! said `backend`.
//!
//! The file holds one word. `backend` runs the checks of the virtualization backend. `page-fault`,
//! `stack-overflow`, `write-code`, `execute-data`, `invalid-opcode` and `panic` make the host fail; the report
//! must name what was done. `panic-halt` and `panic-reset` do as `on-fault` says then. `interrupts` tries timer, kicks and serial line (it waits for a byte),
//! `absent-processor` starts one that is not there, `reset` restarts the machine: one line each,
//! `selftest ok NAME` or `selftest FAILED NAME: REASON`. `lifecycle` runs the VMs of the configuration, as their operator.

mod backend;
pub mod lifecycle;

use alloc::{format, string::String, vec};
use core::{arch::asm, hint::black_box, sync::atomic::Ordering};

use drivers::firmware::Processor;
use manage::{bundle, console::Input};

use crate::{
    boot::Machine,
    console, error, fault, info, interrupts,
    percpu::{self, PerCpu},
    power, smp, time,
};

/// Does what the file says. Returns only when VMs are to run.
pub fn run(machine: Machine) -> Machine {
    let word = match machine.bundle.file("selftest") {
        Some(word) => word,
        None if machine.bundle.file(bundle::CONFIG).is_some() => return machine,
        None => b"backend",
    };
    fault::set_on_fault(fault::OnFault::PowerOff);
    match word.trim_ascii() {
        b"backend" => {
            backend::run();
            power::off()
        }
        b"lifecycle" => {
            lifecycle::prepare();
            return machine;
        }
        b"page-fault" => read_unmapped(),
        b"stack-overflow" => {
            info!("recursed to {}", recurse(u64::MAX));
        }
        b"write-code" => write_code(),
        b"execute-data" => execute_data(),
        b"invalid-opcode" => invalid_opcode(),
        b"panic" => panic!("on purpose"),
        b"panic-halt" => {
            fault::set_on_fault(fault::OnFault::Halt);
            panic!("on purpose")
        }
        b"panic-reset" => {
            fault::set_on_fault(fault::OnFault::Restart);
            panic!("on purpose")
        }
        b"interrupts" => {
            test("timer", timer());
            test("early timer", early_timer());
            test("kick", kick());
            test("output", output());
            test("input", input());
            power::off();
        }
        b"absent-processor" => {
            test("absent processor", absent_processor(machine));
            power::off();
        }
        b"reset" => {
            info!("selftest ok reset: restarting");
            power::reset();
        }
        _ => {}
    }
    error!("nothing failed");
    power::off()
}

fn test(name: &str, result: Result<String, String>) {
    match result {
        Ok(words) => info!("selftest ok {name}: {words}"),
        Err(why) => error!("selftest FAILED {name}: {why}"),
    }
}

/// What has not come after so long does not come, in microseconds: an emulator's processors may stand still for a
/// while, when the workstation has something else to do, and its time does not.
const PATIENCE_US: u64 = 60_000_000;

/// Halts until `done`, or until `us` microseconds have passed by the timer. Returns whether it was done.
fn idle_until(us: u64, mut done: impl FnMut(&PerCpu) -> bool) -> bool {
    let cpu = percpu::current();
    let end = time::now_tsc() + time::us_to_ticks(us);
    loop {
        if done(cpu) {
            interrupts::disarm_timer();
            return true;
        }
        if time::now_tsc() >= end {
            return false;
        }
        interrupts::arm_timer(end);
        interrupts::idle();
    }
}

fn timer() -> Result<String, String> {
    let cpu = percpu::current();
    let mut late = [0; 3];
    for late in &mut late {
        cpu.timer_due.store(false, Ordering::Relaxed);
        let deadline = time::now_tsc() + time::us_to_ticks(5_000);
        interrupts::arm_timer(deadline);
        while !cpu.timer_due.load(Ordering::Relaxed) {
            if time::now_tsc() > deadline + time::us_to_ticks(PATIENCE_US) {
                return Err("it did not come".into());
            }
            interrupts::window();
        }
        let now = time::now_tsc();
        if now + time::us_to_ticks(100) < deadline {
            let early = time::ticks_to_us(deadline - now);
            return Err(format!("it came {early} us early"));
        }
        *late = time::ticks_to_us(now.saturating_sub(deadline));
    }
    Ok(format!("{late:?} us late"))
}

/// A deadline in the past must fire at once, and a disarmed timer not at all.
fn early_timer() -> Result<String, String> {
    let cpu = percpu::current();
    cpu.timer_due.store(false, Ordering::Relaxed);
    interrupts::arm_timer(time::now_tsc() - 1);
    let end = time::now_tsc() + time::us_to_ticks(PATIENCE_US);
    while time::now_tsc() < end && !cpu.timer_due.load(Ordering::Relaxed) {
        interrupts::window();
    }
    if !cpu.timer_due.swap(false, Ordering::Relaxed) {
        return Err("a deadline in the past did not fire".into());
    }
    interrupts::arm_timer(time::now_tsc() + time::us_to_ticks(2_000));
    interrupts::disarm_timer();
    let end = time::now_tsc() + time::us_to_ticks(10_000);
    while time::now_tsc() < end {
        interrupts::window();
    }
    match cpu.timer_due.load(Ordering::Relaxed) {
        true => Err("a disarmed timer fired".into()),
        false => Ok("at once, and not when disarmed".into()),
    }
}

/// Kicks every other processor, which then kicks back from its loop.
fn kick() -> Result<String, String> {
    let me = percpu::current();
    for cpu in (0..percpu::count()).filter_map(percpu::get) {
        cpu.kicked.store(false, Ordering::Relaxed);
        interrupts::kick(cpu);
        if cpu.number == me.number {
            interrupts::window();
        }
        // A processor in its idle loop takes the kick whenever it comes.
        let end = time::now_tsc() + time::us_to_ticks(PATIENCE_US);
        while !cpu.kicked.load(Ordering::Relaxed) {
            if time::now_tsc() >= end {
                return Err(format!("processor {} did not notice", cpu.number));
            }
            core::hint::spin_loop();
        }
    }
    Ok(format!("{} processors", percpu::count()))
}

/// More output than the queue holds, taken as the line drains it.
fn output() -> Result<String, String> {
    let console = console::attach("selftest", true).ok_or("there is no room for a console")?;
    let text = vec![b'.'; 20_000];
    let mut sent = 0;
    let in_time = idle_until(PATIENCE_US, |_| {
        sent += console::guest_output(console, &text[sent..]);
        sent == text.len()
    });
    console::flush();
    console::write_all(b"\r\n");
    match in_time {
        true => Ok(format!("{sent} bytes")),
        false => Err(format!("only {sent} of {} bytes were taken", text.len())),
    }
}

fn input() -> Result<String, String> {
    info!("selftest waits for a byte");
    let mut byte = None;
    idle_until(PATIENCE_US, |_| {
        byte = console::read();
        byte.is_some()
    });
    match byte {
        Some(Input::Guest(_, byte)) => Ok(format!("{byte:#04x}")),
        _ => Err("no byte came by interrupt".into()),
    }
}

fn absent_processor(machine: Machine) -> Result<String, String> {
    let mut firmware = machine.firmware;
    firmware.processors = vec![Processor {
        apic_id: 77,
        enabled: true,
    }];
    let outcome = smp::start(&firmware);
    match (outcome.online, outcome.listed) {
        (1, 2) => Ok("left out".into()),
        other => Err(format!("online and listed: {other:?}")),
    }
}

#[inline(never)]
fn read_unmapped() {
    let address = black_box(0xffff_ffff_8000_0000_u64) as *const u64;
    // SAFETY: none; the address is not mapped, and the fault report is what is tested.
    black_box(unsafe { address.read_volatile() });
}

#[inline(never)]
fn recurse(depth: u64) -> u64 {
    let filler = black_box([depth; 64]);
    match depth {
        0 => filler[0],
        depth => recurse(depth - 1) + filler[1],
    }
}

#[inline(never)]
fn write_code() {
    let code = write_code as *const () as *mut u8;
    // SAFETY: none; code is read-only, and the fault report is what is tested.
    unsafe { code.write_volatile(0xc3) };
}

#[inline(never)]
fn execute_data() {
    let code = black_box([0xc3_u8; 16]);
    // SAFETY: none; the stack is not executable, and the fault report is what is tested.
    let code: extern "C" fn() = unsafe { core::mem::transmute(code.as_ptr()) };
    code();
}

#[inline(never)]
fn invalid_opcode() {
    // SAFETY: none; UD2 faults, and the fault report is what is tested.
    unsafe { asm!("ud2") };
}

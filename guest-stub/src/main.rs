//! guest-stub: a small bare-metal guest that checks, reports and measures its machine.
//!
//! One multiboot (and PVH) image that runs unchanged under Plinth and under plain QEMU
//! (`qemu-system-x86_64 -kernel guest-stub -nographic`). It says hello on COM1, prints facts,
//! runs its checks, and ends as its command line says:
//!
//! | word | meaning |
//! | --- | --- |
//! | `checks=A,B.C` | groups or single checks to run; `none`; all when absent |
//! | `facts=off` | no `fact` lines |
//! | `mode=bench` | measure instead of checking |
//! | `mode=share`, `mode=periodic` | tell how much of the processor it gets, or whether periodic work is in time |
//! | `mode=waits`, `mode=counts` | after each key, tell how late short jobs begin, or how much work gets done |
//! | `mode=work` | from an NMI to the next, each of several processors computes, `iterations=N` steps at least, whose result is told |
//! | `iterations=N`, `mmio=ADDRESS`, `only=NAME`, `start=key` | for the measurements |
//! | `abuse=NAME` | misbehave in one way after the checks; `abuse=list` names them |
//! | `nuisance=NAME` | take more than its share for ever, if the host lets it |
//! | `end=poweroff`, `halt`, `reset`, `triple-fault`, `spin`, `shell`, `button`, `unfed`, `watched`, `watched-by-nmi` | how to end; `halt` when absent; `button`: power off when the power button is pressed; `unfed`: feed the watchdog no more; `watched`, `watched-by-nmi`: the same, and power off when it has fired without and with an NMI |
//! | `exit=VALUE` | end by writing the value to the exit port of test kernels |
//!
//! `boot` enters, `interrupts` catches, `checks` holds the checks by group; the other modules
//! are what these need: processor, memory, page tables, interrupt controllers, clocks, ACPI.

#![no_std]
#![no_main]

mod abuse;
mod acpi;
mod apic;
mod bench;
mod boot;
mod checks;
mod console;
mod cpu;
mod facts;
mod interrupts;
mod legacy;
mod load;
mod machine;
mod memory;
mod nuisance;
mod options;
mod paging;
mod pci;
mod power;
mod shell;
mod smp;
mod time;
mod user;
mod virtio;
mod watchdog;

use core::panic::PanicInfo;

use machine::Machine;
use options::Mode;
use power::End;

/// Called by the entry code, once, in long mode.
extern "C" fn main() -> ! {
    let tsc_at_entry = cpu::tsc();
    console::init();
    println!("\nplinth guest-stub: hello");
    interrupts::init();
    let Some(handoff) = boot::handoff() else {
        println!("stub: the loader speaks neither multiboot nor PVH; halting");
        cpu::halt_forever()
    };
    let options = options::parse(&handoff.command_line);
    let mut machine = Machine::find(handoff);
    if options.facts {
        facts::print(&machine);
    }
    machine.settle();
    machine.calibrate();
    match options.mode {
        Mode::Check => checks::run(&machine, &options.checks),
        Mode::Bench => bench::run(&machine, &options, tsc_at_entry),
        Mode::Share => load::share(&machine),
        Mode::Periodic => load::periodic(&machine),
        Mode::Waits => load::waits(&machine),
        Mode::Counts => load::counts(&machine),
        Mode::Work => load::work(&machine, options.iterations),
    }
    abuse::run(&machine, &options.abuse);
    if !options.nuisance.as_str().is_empty() {
        nuisance::run(&machine, &options.nuisance);
    }
    end(&machine, options.end)
}

/// Ends the run.
fn end(machine: &Machine, end: End) -> ! {
    match end {
        End::PowerOff => power::power_off(machine.acpi.as_ref()),
        End::Reset => power::reset(machine.acpi.as_ref()),
        End::TripleFault => power::triple_fault(),
        End::Spin => power::spin(),
        End::Button => power::wait_for_button(machine),
        End::Unfed => watchdog::stop_feeding(machine, watchdog::After::Halt),
        End::Watched => watchdog::stop_feeding(machine, watchdog::After::Look { nmis: 0 }),
        End::WatchedByNmi => watchdog::stop_feeding(machine, watchdog::After::Look { nmis: 1 }),
        End::Shell => shell::run(machine),
        End::TestExit(value) => power::test_exit(value),
        End::Halt => {
            console::drain();
            cpu::halt_forever()
        }
    }
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    println!("\nstub: panic: {info}");
    cpu::halt_forever()
}

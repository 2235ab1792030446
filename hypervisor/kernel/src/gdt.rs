//! Segments and task state of one processor: flat segments, and a stack of its own for each fault that
//! may come with a bad stack.

use alloc::boxed::Box;

use mem::OutOfFrames;
use x86_64::{
    VirtAddr,
    instructions::{
        segmentation::{CS, DS, ES, FS, GS, SS, Segment},
        tables::load_tss,
    },
    structures::{
        gdt::{Descriptor, GlobalDescriptorTable, SegmentSelector},
        tss::TaskStateSegment,
    },
};

use crate::memory;

/// Bytes of each fault stack.
const FAULT_STACK_BYTES: u64 = 16 * 1024;

/// Which fault stack a vector uses: index into the task state's interrupt stack table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FaultStack {
    /// Double fault.
    DoubleFault = 0,
    /// Non-maskable interrupt.
    Nmi,
    /// Machine check.
    MachineCheck,
    /// Page fault: the usual end of an overflowing stack.
    PageFault,
}

impl FaultStack {
    const ALL: [FaultStack; 4] = [
        FaultStack::DoubleFault,
        FaultStack::Nmi,
        FaultStack::MachineCheck,
        FaultStack::PageFault,
    ];

    /// Value of a gate's IST field.
    pub const fn gate_field(self) -> u8 {
        self as u8 + 1
    }
}

/// Selector of 64-bit kernel code.
pub const CODE: SegmentSelector = SegmentSelector(8);

/// Descriptor table and task state of one processor.
pub struct Tables {
    gdt: GlobalDescriptorTable,
    data: SegmentSelector,
    task: SegmentSelector,
}

impl Tables {
    /// Makes tables and fault stacks.
    ///
    /// # Errors
    /// No frames for the stacks.
    pub fn new() -> Result<&'static Self, OutOfFrames> {
        let mut tss = TaskStateSegment::new();
        for stack in FaultStack::ALL {
            tss.interrupt_stack_table[stack as usize] =
                VirtAddr::new(memory::new_stack(FAULT_STACK_BYTES)?);
        }
        let mut gdt = GlobalDescriptorTable::new();
        let code = gdt.append(Descriptor::kernel_code_segment());
        assert_eq!(code, CODE);
        let data = gdt.append(Descriptor::kernel_data_segment());
        let task = gdt.append(Descriptor::tss_segment(Box::leak(Box::new(tss))));
        Ok(Box::leak(Box::new(Tables { gdt, data, task })))
    }

    /// Puts the tables in force on the calling processor. Clears the GS base.
    pub fn load(&'static self) {
        self.gdt.load();
        // SAFETY: the selectors are of this table: 64-bit code, flat data, this processor's own free task state.
        unsafe {
            CS::set_reg(CODE);
            SS::set_reg(self.data);
            DS::set_reg(self.data);
            ES::set_reg(self.data);
            FS::set_reg(SegmentSelector::NULL);
            GS::set_reg(SegmentSelector::NULL);
            load_tss(self.task);
        }
    }
}

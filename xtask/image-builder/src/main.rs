//! Makes a bootable disk image from a kernel and a ramdisk.
use std::path::Path;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let mut builder = bootloader::DiskImageBuilder::new(args[1].clone().into());
    if args.len() > 4 {
        builder.set_ramdisk(args[4].clone().into());
    }
    builder.create_bios_image(Path::new(&args[2])).unwrap();
    builder.create_uefi_image(Path::new(&args[3])).unwrap();
}

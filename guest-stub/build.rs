//! Links the image at 1 MiB, statically, by `link.ld`: needs no flags from outside.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=link.ld");
    println!("cargo:rerun-if-changed=src/boot.s");
    println!("cargo:rerun-if-changed=src/legacy.s");
    println!("cargo:rerun-if-changed=src/traps.s");
    // A `cargo check` for the workstation only looks at types.
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("none") {
        return;
    }
    let directory = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it");
    // The target's default is a static PIE; loaders of multiboot images do not relocate.
    for argument in [
        &format!("-T{directory}/link.ld"),
        "--no-pie",
        "--build-id=none",
        "-zmax-page-size=4096",
        "-znorelro",
    ] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
}

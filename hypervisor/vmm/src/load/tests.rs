use super::*;
use alloc::{boxed::Box, string::ToString, vec};
use mem::fake::FakeMemory;
use proptest::prelude::*;
use std::sync::LazyLock;

const MIB: u64 = 1 << 20;

/// Loads a kernel called "kernel".
fn load(
    memory: &GuestMemory,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    command_line: &str,
    layout: &BootLayout<'_>,
) -> Result<Entry, LoadError> {
    let modules: Vec<Module<'_>> = initrd
        .map(|data| Module {
            data,
            text: "initrd",
        })
        .into_iter()
        .collect();
    let files = BootFiles {
        kernel,
        kernel_name: "kernel",
        modules: &modules,
        command_line,
    };
    super::load(memory, &files, layout)
}

fn memory(mib: u64) -> GuestMemory {
    let host: &'static FakeMemory = Box::leak(Box::new(FakeMemory::new((mib + 8) * MIB)));
    GuestMemory::allocate(host, 1, &mem::guest::pc_layout(mib * MIB)).unwrap()
}

const RESERVED: [MapEntry; 2] = [
    MapEntry {
        range: GuestRange {
            start: Gpa(0xa_0000),
            bytes: 0x6_0000,
        },
        kind: MapKind::Reserved,
    },
    MapEntry {
        range: GuestRange {
            start: Gpa(0xe000_0000),
            bytes: 0x1000_0000,
        },
        kind: MapKind::Reserved,
    },
];

const LAYOUT: BootLayout<'static> = BootLayout {
    reserved: &RESERVED,
    rsdp: Some(Gpa(0xe_0000)),
    text_screen: false,
};

fn bytes(memory: &GuestMemory, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read(Gpa(at), &mut bytes).unwrap();
    bytes
}

fn text(memory: &GuestMemory, at: u64) -> alloc::string::String {
    let all = bytes(memory, at, 256);
    let end = all.iter().position(|b| *b == 0).unwrap();
    alloc::string::String::from_utf8(all[..end].to_vec()).unwrap()
}

fn u32_at(memory: &GuestMemory, at: u64) -> u64 {
    memory.read_u32(Gpa(at)).unwrap().into()
}

fn u64_at(memory: &GuestMemory, at: u64) -> u64 {
    memory.read_u64(Gpa(at)).unwrap()
}

/// The 32-bit flat state of PVH and multiboot; CS base, limit and rights as both protocols demand.
fn assert_flat_32(memory: &GuestMemory, state: &CpuState) {
    assert_eq!((state.cr0, state.cr4, state.efer), (0x11, 0, 0));
    assert_eq!(state.rflags, 2);
    let cs = state.segments[SegmentName::Cs as usize];
    assert_eq!(
        (cs.base, cs.limit, u32::from(cs.rights)),
        (0, u32::MAX, 0xc09b)
    );
    let ss = state.segments[SegmentName::Ss as usize];
    assert_eq!(
        (ss.base, ss.limit, u32::from(ss.rights)),
        (0, u32::MAX, 0xc093)
    );
    assert_eq!(
        u64_at(memory, state.gdtr.base + u64::from(cs.selector)),
        0x00cf_9b00_0000_ffff
    );
    assert_eq!(
        u64_at(memory, state.gdtr.base + u64::from(ss.selector)),
        0x00cf_9300_0000_ffff
    );
}

// --- bzImage -------------------------------------------------------------------------------------

const SETUP_SECTS: usize = 3;
const PAYLOAD: usize = 0x3000;

/// Writes a field of the setup header.
fn patch(image: &mut [u8], at: usize, value: &[u8]) {
    image[at..at + value.len()].copy_from_slice(value);
}

/// A bzImage of protocol 2.15 whose protected-mode part is 0xcc throughout.
fn bzimage() -> Vec<u8> {
    let start = (SETUP_SECTS + 1) * 512;
    let mut image = vec![0; start];
    image.resize(start + PAYLOAD, 0xcc);
    patch(&mut image, 0x1f1, &[SETUP_SECTS as u8]);
    patch(&mut image, 0x1f4, &(PAYLOAD as u32 / 16).to_le_bytes());
    patch(&mut image, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    patch(&mut image, 0x202, b"HdrS\x0f\x02");
    patch(&mut image, 0x211, &[0x01]);
    patch(&mut image, 0x22c, &0x7fff_ffff_u32.to_le_bytes());
    patch(&mut image, 0x230, &0x20_0000_u32.to_le_bytes());
    patch(&mut image, 0x234, &[1, 21, 0x3f, 0]);
    patch(&mut image, 0x238, &2047_u32.to_le_bytes());
    patch(&mut image, 0x258, &0x100_0000_u64.to_le_bytes());
    patch(&mut image, 0x260, &0x30_0000_u32.to_le_bytes());
    image
}

#[test]
fn a_bzimage_is_entered_as_the_64_bit_protocol_says() {
    let memory = memory(64);
    let initrd = vec![0x5a; 10_000];
    let entry = load(&memory, &bzimage(), Some(&initrd), "console=ttyS0", &LAYOUT).unwrap();
    assert_eq!(entry.protocol, Protocol::Linux64);
    let state = &entry.state;
    assert_eq!(state.rip, 0x100_0200);
    assert_eq!(
        (state.cr0, state.cr4, state.efer),
        (0x8000_0011, 0x20, 0x500)
    );
    assert_eq!((state.rflags, state.idtr), (2, DescriptorTable::default()));
    let cs = state.segments[SegmentName::Cs as usize];
    assert_eq!((cs.selector, u32::from(cs.rights)), (0x10, 0xa09b));
    for name in [SegmentName::Ds, SegmentName::Es, SegmentName::Ss] {
        let data = state.segments[name as usize];
        assert_eq!((data.selector, u32::from(data.rights)), (0x18, 0xc093));
    }
    assert_eq!(
        u64_at(&memory, state.gdtr.base + 0x10),
        0x00af_9b00_0000_ffff
    );
    assert_eq!(
        u64_at(&memory, state.gdtr.base + 0x18),
        0x00cf_9300_0000_ffff
    );

    assert_eq!(bytes(&memory, 0x100_0000, PAYLOAD), vec![0xcc; PAYLOAD]);
    let zero_page = state.gprs[Gpr::Rsi as usize];
    assert_eq!(bytes(&memory, zero_page + 0x202, 4), b"HdrS");
    assert_eq!(bytes(&memory, zero_page + 0x210, 2), [0xff, 0x01]);
    assert_eq!(u32_at(&memory, zero_page + 0x214), 0x100_0000);
    assert_eq!(
        text(&memory, u32_at(&memory, zero_page + 0x228)),
        "console=ttyS0"
    );
    assert_eq!(u64_at(&memory, zero_page + 0x70), 0xe_0000);
    // The sentinel: not zero would mean a careless loader.
    assert_eq!(bytes(&memory, zero_page + 0x1ef, 1), [0]);

    // The initrd lies as high as 64 MiB allow, in whole pages.
    let ramdisk = u32_at(&memory, zero_page + 0x218);
    assert_eq!(ramdisk, 64 * MIB - 3 * PAGE_SIZE);
    assert_eq!(u32_at(&memory, zero_page + 0x21c), 10_000);
    assert_eq!(bytes(&memory, ramdisk, 10_000), initrd);

    // The map: RAM up to 640 KiB, the hole, RAM up to 64 MiB, the devices.
    let lines: Vec<_> = (0..u64::from(bytes(&memory, zero_page + 0x1e8, 1)[0]))
        .map(|i| zero_page + 0x2d0 + 20 * i)
        .map(|at| {
            (
                u64_at(&memory, at),
                u64_at(&memory, at + 8),
                u32_at(&memory, at + 16),
            )
        })
        .collect();
    assert_eq!(
        lines,
        [
            (0, 0xa_0000, 1),
            (0xa_0000, 0x6_0000, 2),
            (MIB, 63 * MIB, 1),
            (0xe000_0000, 0x1000_0000, 2),
        ]
    );
}

#[test]
fn a_kernel_without_64_bit_entry_is_entered_as_the_32_bit_protocol_says() {
    let memory = memory(64);
    let mut without_entry = bzimage();
    patch(&mut without_entry, 0x236, &[0x3e, 0]);
    // What is no flag yet says nothing.
    let mut without_flags = bzimage();
    patch(&mut without_flags, 0x206, &[0x0a, 0x02]);
    for image in [without_entry, without_flags] {
        let entry = load(&memory, &image, Some(&[1; 5000]), "quiet", &LAYOUT).unwrap();
        assert_eq!(entry.protocol, Protocol::Linux32);
        let state = &entry.state;
        assert_eq!((state.rip, state.cr3), (0x100_0000, 0));
        assert_flat_32(&memory, state);
        let selector = |name| state.segments[name as usize].selector;
        assert_eq!(selector(SegmentName::Cs), 0x10);
        for name in [SegmentName::Ds, SegmentName::Es, SegmentName::Ss] {
            assert_eq!(selector(name), 0x18);
        }
        for gpr in [Gpr::Rbp, Gpr::Rdi, Gpr::Rbx] {
            assert_eq!(state.gprs[gpr as usize], 0);
        }
        let zero_page = state.gprs[Gpr::Rsi as usize];
        let command_line = u32_at(&memory, zero_page + 0x228);
        assert_eq!(text(&memory, command_line), "quiet");
        assert!(u32_at(&memory, zero_page + 0x218) > 0x100_0000);
    }
}

#[test]
fn the_first_4_gib_are_mapped_one_to_one() {
    let memory = memory(64);
    let state = load(&memory, &bzimage(), None, "", &LAYOUT).unwrap().state;
    let walk = |address: u64| {
        let entry = |table: u64, shift: u32| {
            u64_at(&memory, (table & !0xfff) + (address >> shift & 511) * 8)
        };
        let directory = entry(entry(state.cr3, 39), 30);
        (directory & 1 != 0).then(|| entry(directory, 21))
    };
    for address in [0, 0x1234_5678, 0x1_0000_0000 - 1] {
        assert_eq!(walk(address), Some((address & !0x1f_ffff) | 0x83));
    }
    assert_eq!(walk(1 << 32), None);
}

#[test]
fn a_relocatable_kernel_moves_when_its_place_is_not_there() {
    // The preferred 16 MiB and 3 MiB from there don't fit into 18 MiB.
    let memory = memory(18);
    let entry = load(&memory, &bzimage(), None, "", &LAYOUT).unwrap();
    assert_eq!(entry.state.rip, 2 * MIB + 0x200);
    let mut fixed = bzimage();
    fixed[0x234] = 0;
    assert_eq!(
        load(&memory, &fixed, None, "", &LAYOUT),
        Err(LoadError::PlaceTaken {
            start: Gpa(16 * MIB),
            bytes: 0x30_0000
        })
    );
}

#[test]
fn the_initrd_stays_below_the_kernels_limit() {
    let memory = memory(64);
    let mut image = bzimage();
    patch(&mut image, 0x236, &[0x01]);
    patch(&mut image, 0x22c, &0x2ff_ffff_u32.to_le_bytes());
    let entry = load(&memory, &image, Some(&[1; 5000]), "", &LAYOUT).unwrap();
    let zero_page = entry.state.gprs[Gpr::Rsi as usize];
    assert_eq!(u32_at(&memory, zero_page + 0x218), 0x300_0000 - 0x2000);
}

#[test]
fn bad_bzimages_are_refused_by_name() {
    let memory = memory(64);
    let refusal = |at: usize, value: &[u8]| {
        let mut image = bzimage();
        patch(&mut image, at, value);
        load(&memory, &image, None, "", &LAYOUT)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        refusal(0x206, &[0x09, 0x02]),
        "boot protocol 2.09 is too old; needs 2.10 (Linux 2.6.31) or later"
    );
    assert_eq!(refusal(0x211, &[0]), "damaged: loadflags can't be 0x0");
    assert_eq!(
        refusal(0x230, &[3, 0, 0, 0]),
        "damaged: kernel_alignment can't be 0x3"
    );
    assert_eq!(refusal(0x1f4, &[0; 4]), "damaged: syssize can't be 0x0");
    assert_eq!(
        refusal(0x260, &[0, 1, 0, 0]),
        "damaged: init_size can't be 0x100"
    );
    assert_eq!(
        refusal(0x201, &[0]),
        "boot protocol 0.00 is too old; needs 2.10 (Linux 2.6.31) or later"
    );
    assert_eq!(
        refusal(0x260, &[0, 0, 0, 0x80]),
        "the kernel (2147483648 bytes) does not fit; give the VM more memory"
    );
    assert_eq!(
        refusal(0x202, b"hdrs"),
        "not a bzImage, ELF or multiboot kernel"
    );
}

#[test]
fn a_cut_bzimage_is_refused_with_its_lengths() {
    let memory = memory(64);
    let image = bzimage();
    let full = image.len();
    for has in [0x206, 0x26b, 2000, 2048, full - 16] {
        let error = load(&memory, &image[..has], None, "", &LAYOUT).unwrap_err();
        assert!(
            matches!(error, LoadError::CutShort { needs, has: h } if h == has as u64 && needs > h),
            "{has}: {error:?}"
        );
    }
    assert_eq!(
        load(&memory, &image[..full - 16], None, "", &LAYOUT)
            .unwrap_err()
            .to_string(),
        "cut short: header says 14336 bytes, file has 14320"
    );
    // The last paragraph may lack its padding.
    assert!(load(&memory, &image[..full - 15], None, "", &LAYOUT).is_ok());
}

#[test]
fn what_does_not_fit_is_named() {
    let memory = memory(64);
    let long = "x".repeat(2048);
    assert_eq!(
        load(&memory, &bzimage(), None, &long, &LAYOUT)
            .unwrap_err()
            .to_string(),
        "command line too long: 2048 bytes, the kernel takes 2047"
    );
    assert!(load(&memory, &bzimage(), None, &long[1..], &LAYOUT).is_ok());
    let initrd = vec![0; 60 << 20];
    assert_eq!(
        load(&memory, &bzimage(), Some(&initrd), "", &LAYOUT)
            .unwrap_err()
            .to_string(),
        "the initrd (62914560 bytes) does not fit; give the VM more memory"
    );
    let everything = [MapEntry {
        range: GuestRange {
            start: Gpa(0),
            bytes: 0xa_0000,
        },
        kind: MapKind::Reserved,
    }];
    let layout = BootLayout {
        reserved: &everything,
        rsdp: None,
        text_screen: false,
    };
    assert!(matches!(
        load(&memory, &bzimage(), None, "", &layout),
        Err(LoadError::NoRoom { .. })
    ));
}

// --- ELF -----------------------------------------------------------------------------------------

/// A program header: type, file offset, physical address, bytes in the file, bytes in memory.
type Segment64 = (u32, u64, u64, u64, u64);

const HEADERS: usize = 0x200;
const TEXT: u64 = 0x20_0000;

fn elf64(entry: u64, segments: &[Segment64], content: &[u8]) -> Vec<u8> {
    let mut image = vec![0; HEADERS];
    patch(&mut image, 0, b"\x7fELF\x02\x01\x01");
    patch(&mut image, 16, &2_u16.to_le_bytes());
    patch(&mut image, 18, &62_u16.to_le_bytes());
    patch(&mut image, 20, &1_u32.to_le_bytes());
    patch(&mut image, 24, &entry.to_le_bytes());
    patch(&mut image, 32, &64_u64.to_le_bytes());
    patch(&mut image, 52, &64_u16.to_le_bytes());
    patch(&mut image, 54, &56_u16.to_le_bytes());
    patch(&mut image, 56, &(segments.len() as u16).to_le_bytes());
    for (i, (kind, offset, address, in_file, in_memory)) in segments.iter().enumerate() {
        let at = 64 + 56 * i;
        patch(&mut image, at, &kind.to_le_bytes());
        patch(&mut image, at + 8, &offset.to_le_bytes());
        // The virtual address is of no interest to the loader.
        patch(
            &mut image,
            at + 16,
            &0xffff_ffff_8000_0000_u64.to_le_bytes(),
        );
        patch(&mut image, at + 24, &address.to_le_bytes());
        patch(&mut image, at + 32, &in_file.to_le_bytes());
        patch(&mut image, at + 40, &in_memory.to_le_bytes());
        patch(&mut image, at + 48, &4_u64.to_le_bytes());
    }
    image.extend_from_slice(content);
    image
}

fn elf32(entry: u32, address: u32, content: &[u8], in_memory: u32) -> Vec<u8> {
    let mut image = vec![0; HEADERS];
    patch(&mut image, 0, b"\x7fELF\x01\x01\x01");
    patch(&mut image, 16, &2_u16.to_le_bytes());
    patch(&mut image, 18, &3_u16.to_le_bytes());
    patch(&mut image, 20, &1_u32.to_le_bytes());
    patch(&mut image, 24, &entry.to_le_bytes());
    patch(&mut image, 28, &52_u32.to_le_bytes());
    patch(&mut image, 40, &52_u16.to_le_bytes());
    patch(&mut image, 42, &32_u16.to_le_bytes());
    patch(&mut image, 44, &1_u16.to_le_bytes());
    let words = [
        1,
        HEADERS as u32,
        0xc000_0000,
        address,
        content.len() as u32,
        in_memory,
    ];
    for (i, word) in words.iter().enumerate() {
        patch(&mut image, 52 + 4 * i, &word.to_le_bytes());
    }
    image.extend_from_slice(content);
    image
}

/// Code, and the PVH note behind it.
fn pvh() -> Vec<u8> {
    let mut content = vec![0x90; 0x100];
    for word in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), TEXT as u32 + 0x10] {
        content.extend_from_slice(&word.to_le_bytes());
    }
    let note = HEADERS as u64 + 0x100;
    let segments = [
        (1, HEADERS as u64, TEXT, 0x100, 0x2000),
        (4, note, 0, 20, 20),
    ];
    elf64(0xffff_ffff_8100_0000, &segments, &content)
}

#[test]
fn a_pvh_kernel_is_entered_at_its_note() {
    let memory = memory(16);
    // What is left in memory of an earlier life must not show in the bss.
    memory.write(Gpa(TEXT), &[0xff; 0x3000]).unwrap();
    let entry = load(&memory, &pvh(), Some(b"initrd"), "quiet", &LAYOUT).unwrap();
    assert_eq!(
        (entry.protocol, entry.state.rip),
        (Protocol::Pvh, TEXT + 0x10)
    );
    assert_flat_32(&memory, &entry.state);
    assert_eq!(bytes(&memory, TEXT, 0x100), [0x90; 0x100]);
    assert_eq!(bytes(&memory, TEXT + 0x100, 0x1f00), [0; 0x1f00]);
    assert_eq!(bytes(&memory, TEXT + 0x2006, 1), [0xff]);

    let info = entry.state.gprs[Gpr::Rbx as usize];
    let words: Vec<_> = (0..4).map(|i| u32_at(&memory, info + 4 * i)).collect();
    assert_eq!(words, [0x336e_c578, 1, 0, 1]);
    let module = u64_at(&memory, info + 16);
    assert_eq!(
        (u64_at(&memory, module), u64_at(&memory, module + 8)),
        (TEXT + 0x2000, 6)
    );
    assert_eq!(bytes(&memory, TEXT + 0x2000, 6), b"initrd");
    assert_eq!(text(&memory, u64_at(&memory, info + 24)), "quiet");
    assert_eq!(u64_at(&memory, info + 32), 0xe_0000);
    let map = u64_at(&memory, info + 40);
    assert_eq!(u32_at(&memory, info + 48), 4);
    assert_eq!(
        (
            u64_at(&memory, map + 48),
            u64_at(&memory, map + 56),
            u32_at(&memory, map + 64)
        ),
        (MIB, 15 * MIB, 1)
    );
}

/// A multiboot header with these flags.
fn header(flags: u32) -> Vec<u8> {
    let magic = 0x1bad_b002_u32;
    let sum = 0_u32.wrapping_sub(magic).wrapping_sub(flags);
    [magic, flags, sum]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect()
}

fn multiboot32(flags: u32) -> Vec<u8> {
    let mut content = header(flags);
    content.resize(0x80, 0xf4);
    elf32(TEXT as u32 + 12, TEXT as u32, &content, 0x1000)
}

#[test]
fn a_multiboot_elf_is_entered_at_its_entry() {
    let memory = memory(16);
    let entry = load(
        &memory,
        &multiboot32(3),
        Some(b"module"),
        "check all",
        &LAYOUT,
    )
    .unwrap();
    assert_eq!(
        (entry.protocol, entry.state.rip),
        (Protocol::Multiboot, TEXT + 12)
    );
    assert_eq!(entry.state.gprs[Gpr::Rax as usize], 0x2bad_b002);
    assert_flat_32(&memory, &entry.state);
    assert_eq!(bytes(&memory, TEXT, 0x80)[12..], [0xf4; 0x74]);

    let info = entry.state.gprs[Gpr::Rbx as usize];
    let word = |i: u64| u32_at(&memory, info + 4 * i);
    assert_eq!(word(0), 0b10_0100_1101);
    assert_eq!((word(1), word(2)), (640, 15 * 1024));
    assert_eq!(text(&memory, word(4)), "kernel check all");
    assert_eq!(word(5), 1);
    let module = word(6);
    assert_eq!(
        (u32_at(&memory, module), u32_at(&memory, module + 4)),
        (TEXT + 0x2000, TEXT + 0x2006)
    );
    let (length, map) = (word(11), word(12));
    assert_eq!((length, u32_at(&memory, map)), (4 * 24, 20));
    assert_eq!(
        (u64_at(&memory, map + 52), u64_at(&memory, map + 60)),
        (MIB, 15 * MIB)
    );
    assert_eq!(text(&memory, word(16)), "Plinth");
}

#[test]
fn modules_keep_their_order_and_their_strings() {
    let memory = memory(16);
    let texts = ["first a=1", "second"];
    let data = [vec![1; 5000], vec![2; 3]];
    let modules: Vec<_> = data
        .iter()
        .zip(texts)
        .map(|(data, text)| Module { data, text })
        .collect();
    let mut files = BootFiles {
        kernel: &multiboot32(0),
        kernel_name: "k",
        modules: &modules,
        command_line: "",
    };
    let entry = super::load(&memory, &files, &LAYOUT).unwrap();
    let info = entry.state.gprs[Gpr::Rbx as usize];
    assert_eq!(text(&memory, u32_at(&memory, info + 16)), "k ");
    assert_eq!(u32_at(&memory, info + 20), 2);
    let list = u32_at(&memory, info + 24);
    let mut places = Vec::new();
    for (n, (data, name)) in (0..).zip(data.iter().zip(texts)) {
        let word = |i: u64| u32_at(&memory, list + 16 * n + 4 * i);
        assert_eq!(bytes(&memory, word(0), data.len()), *data);
        assert_eq!(word(1) - word(0), data.len() as u64);
        assert_eq!(text(&memory, word(2)), name);
        places.push(word(0));
    }
    // Behind the kernel a page for the list and the texts.
    assert_eq!(
        (list, places),
        (TEXT + 0x1000, vec![TEXT + 0x2000, TEXT + 0x4000])
    );
    assert_eq!((info, u32_at(&memory, info + 48)), (0x9500, 0x9000));
    let kernel = bzimage();
    files.kernel = &kernel;
    assert_eq!(
        super::load(&memory, &files, &LAYOUT),
        Err(LoadError::ManyModules { count: 2 })
    );
}

#[test]
fn an_entry_in_the_upper_half_is_brought_down() {
    let memory = memory(16);
    let mut content = header(4);
    content.resize(0x80, 0xf4);
    let mut image = elf32(0xc000_0010, TEXT as u32, &content, 0x1000);
    // Executable; without that, the entry would be taken for a physical address.
    patch(&mut image, 52 + 24, &5_u32.to_le_bytes());
    let entry = load(&memory, &image, None, "", &LAYOUT).unwrap();
    assert_eq!(entry.state.rip, TEXT + 0x10);
}

#[test]
fn multiboot_comes_before_pvh_but_for_64_bit_files_without_addresses() {
    let memory = memory(16);
    let protocol = |image: &[u8]| load(&memory, image, None, "", &LAYOUT).unwrap().protocol;
    let with = |header: Vec<u8>| {
        let mut image = pvh();
        patch(&mut image, HEADERS, &header);
        image
    };
    assert_eq!(protocol(&with(header(0))), Protocol::Pvh);
    let mut addresses = header(1 << 16);
    let start = TEXT as u32;
    for word in [start, start, start + 0x100, 0, start + 0x40] {
        addresses.extend(word.to_le_bytes());
    }
    assert_eq!(protocol(&with(addresses)), Protocol::Multiboot);
}

#[test]
fn a_64_bit_multiboot_elf_is_loaded_too() {
    let memory = memory(16);
    let mut content = header(0);
    content.resize(0x40, 0xf4);
    let segments = [(1, HEADERS as u64, TEXT, 0x40, 0x40)];
    let image = elf64(TEXT + 12, &segments, &content);
    let entry = load(&memory, &image, None, "", &LAYOUT).unwrap();
    assert_eq!(
        (entry.protocol, entry.state.rip),
        (Protocol::Multiboot, TEXT + 12)
    );
    assert_flat_32(&memory, &entry.state);
}

/// A flat multiboot file: 16 bytes, then the header, then code. The addresses follow the header.
fn flat(addresses: [u32; 5]) -> Vec<u8> {
    let mut image = vec![0; 16];
    image.extend(header(1 << 16));
    image.extend(addresses.iter().flat_map(|word| word.to_le_bytes()));
    image.resize(0x100, 0xf4);
    image
}

const FLAT: [u32; 5] = [0x10_0010, 0x10_0000, 0x10_0100, 0x10_1000, 0x10_0030];

#[test]
fn a_flat_multiboot_kernel_goes_where_its_header_says() {
    let memory = memory(16);
    memory.write(Gpa(MIB), &[0xff; 0x2000]).unwrap();
    let image = flat(FLAT);
    let entry = load(&memory, &image, None, "", &LAYOUT).unwrap();
    assert_eq!(
        (entry.protocol, entry.state.rip),
        (Protocol::Multiboot, 0x10_0030)
    );
    assert_eq!(bytes(&memory, MIB, 0x100), image);
    assert_eq!(bytes(&memory, MIB + 0x100, 0xf00), [0; 0xf00]);
    assert_eq!(bytes(&memory, MIB + 0x1fff, 1), [0xff]);
    // Ends of zero: the whole file, and no bss.
    let [header, load_addr, _, _, entry_addr] = FLAT;
    let image = flat([header, load_addr, 0, 0, entry_addr]);
    memory.write(Gpa(MIB), &[0xff; 0x2000]).unwrap();
    assert!(load(&memory, &image, None, "", &LAYOUT).is_ok());
    assert_eq!(bytes(&memory, MIB, 0x101), [&image[..], &[0xff]].concat());
}

#[test]
fn bad_flat_kernels_are_refused_by_name() {
    let memory = memory(16);
    let refusal = |index: usize, value: u32| {
        let mut addresses = FLAT;
        addresses[index] = value;
        load(&memory, &flat(addresses), None, "", &LAYOUT)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        refusal(0, 0xf_0000),
        "damaged: header_addr can't be 0xf0000"
    );
    assert_eq!(
        refusal(0, 0x10_0011),
        "damaged: load_addr can't be 0x100000"
    );
    assert_eq!(
        refusal(2, 0xf_0000),
        "damaged: load_end_addr can't be 0xf0000"
    );
    assert_eq!(
        refusal(2, 0x10_0101),
        "cut short: header says 257 bytes, file has 256"
    );
    assert_eq!(
        refusal(3, 0x10_00ff),
        "damaged: bss_end_addr can't be 0x1000ff"
    );
    assert_eq!(
        refusal(4, 0x10_1000),
        "damaged: the entry address can't be 0x101000"
    );
    assert!(refusal(3, 0x7000_0000).contains("which is not free RAM; give the VM more memory"));
    assert_eq!(
        load(&memory, &multiboot32(8), None, "", &LAYOUT),
        Err(LoadError::MultibootDemands { flags: 8 })
    );
    // A header whose words don't sum to zero is none.
    let mut image = flat(FLAT);
    image[24] ^= 1;
    assert_eq!(
        load(&memory, &image, None, "", &LAYOUT),
        Err(LoadError::NotAKernel)
    );
}

#[test]
fn bad_elf_kernels_are_refused_by_name() {
    let memory = memory(16);
    let fails = |image: &[u8]| load(&memory, image, None, "", &LAYOUT).unwrap_err();
    let plain = elf64(TEXT, &[(1, HEADERS as u64, TEXT, 4, 4)], &[0; 4]);
    assert_eq!(fails(&plain), LoadError::NoProtocol);
    assert_eq!(fails(b"\x7fELF"), LoadError::CutShort { needs: 16, has: 4 });

    let with = |at: usize, value: &[u8]| {
        let mut image = pvh();
        patch(&mut image, at, value);
        fails(&image)
    };
    assert_eq!(with(5, &[2]), LoadError::BadElf("not little-endian"));
    assert_eq!(with(18, &[183]), LoadError::BadElf("not for x86"));
    assert_eq!(with(32, &[0]), LoadError::BadElf("no program headers"));
    let count = LoadError::BadField {
        name: "e_phnum",
        value: 0x41,
    };
    let mut many = pvh();
    many[56] = 0x41;
    many.resize(0x2000, 0);
    assert_eq!(fails(&many), count);
    // The first segment: file size beyond memory size, beyond the file, place in a hole.
    let too_big = LoadError::BadField {
        name: "p_filesz",
        value: 0x3000,
    };
    assert_eq!(with(64 + 32, &0x3000_u64.to_le_bytes()), too_big);
    assert_eq!(
        with(64 + 32, &0x1000_u64.to_le_bytes()),
        LoadError::CutShort {
            needs: 0x1200,
            has: 0x314
        }
    );
    for address in [0xb_0000_u64, 0, 16 * MIB - 1, 1 << 40, u64::MAX] {
        let taken = LoadError::PlaceTaken {
            start: Gpa(address),
            bytes: 0x2000,
        };
        assert_eq!(with(64 + 24, &address.to_le_bytes()), taken);
    }
    // The note's entry point lies outside the kernel.
    let outside = LoadError::BadField {
        name: "the PVH entry address",
        value: TEXT + 0x2000,
    };
    assert_eq!(
        with(HEADERS + 0x110, &(TEXT as u32 + 0x2000).to_le_bytes()),
        outside
    );
}

#[test]
fn overlapping_segments_are_refused() {
    let memory = memory(16);
    let mut image = pvh();
    // The note segment becomes a second one to load, over the first.
    patch(&mut image, 64 + 56, &1_u32.to_le_bytes());
    patch(&mut image, 64 + 56 + 24, &(TEXT + 0x1fff).to_le_bytes());
    image.splice(HEADERS..HEADERS, header(0));
    patch(&mut image, 24, &TEXT.to_le_bytes());
    assert_eq!(
        load(&memory, &image, None, "", &LAYOUT),
        Err(LoadError::PlaceTaken {
            start: Gpa(TEXT + 0x1fff),
            bytes: 20
        })
    );
}

#[test]
fn anything_else_is_not_a_kernel() {
    let memory = memory(4);
    for image in [&b""[..], b"MZ", b"#!/bin/sh\n", &[0; 100_000]] {
        let error = load(&memory, image, None, "", &LAYOUT).unwrap_err();
        assert_eq!(error.to_string(), "not a bzImage, ELF or multiboot kernel");
    }
}

static SHARED: LazyLock<GuestMemory> = LazyLock::new(|| memory(32));

/// Whatever the file: no panic, and an entry only within RAM.
fn survives(image: &[u8]) {
    if let Ok(entry) = load(&SHARED, image, Some(&[1; 100]), "x", &LAYOUT) {
        assert!(SHARED.contains(Gpa(entry.state.rip), 1), "{entry:?}");
    }
}

proptest! {
    #[test]
    fn damaged_files_never_panic(
        which in 0..4usize,
        edits in prop::collection::vec((0..0x320usize, any::<u8>()), 0..12),
        words in prop::collection::vec((0..0xc8usize, prop::sample::select(vec![0, 1, 0x7fff_ffff, u32::MAX, 0x8000_0000])), 0..3),
        keep in 0..0x400usize,
    ) {
        let mut image = [bzimage(), pvh(), multiboot32(3), flat(FLAT)][which].clone();
        for (at, byte) in edits {
            if let Some(b) = image.get_mut(at) {
                *b = byte;
            }
        }
        for (at, word) in words {
            if image.len() >= 4 * at + 4 {
                patch(&mut image, 4 * at, &u32::to_le_bytes(word));
            }
        }
        survives(&image);
        survives(&image[..keep.min(image.len())]);
    }

    /// One field of the setup header at a time, so that the later checks are reached.
    #[test]
    fn any_header_field_is_survived(at in 0x1f1..0x26cusize, value in any::<[u8; 8]>(), width in 1..9usize) {
        let mut image = bzimage();
        patch(&mut image, at, &value[..width]);
        survives(&image);
    }

    #[test]
    fn any_program_header_is_survived(at in 0..176usize, value in any::<[u8; 8]>(), width in 1..9usize) {
        let mut image = pvh();
        patch(&mut image, at, &value[..width]);
        survives(&image);
    }

    #[test]
    fn any_flat_addresses_are_survived(
        addresses in prop::array::uniform5(prop_oneof![any::<u32>(), 0xf_f000..0x20_0000u32]),
    ) {
        survives(&flat(addresses));
    }

    /// Places taken lie in what was free, are aligned, and don't overlap.
    #[test]
    fn space_is_given_out_once(
        takes in prop::collection::vec((1..300_000u64, 0..17u32, any::<bool>(), 0..0x40_0000u64), 1..40),
    ) {
        let mut space = Space::new(&SHARED, &LAYOUT);
        let mut taken: Vec<(u64, u64)> = Vec::new();
        for (bytes, align, low, limit) in takes {
            let align = 1 << align;
            let place = if low {
                space.take_first(bytes, align, limit, 32 * MIB)
            } else {
                space.take_last(bytes, align, limit)
            };
            let Some(start) = place.map(|gpa| gpa.0) else { continue };
            let end = start + bytes;
            prop_assert!(start.is_multiple_of(align) && start >= PAGE_SIZE && end <= 32 * MIB);
            let within = if low { start >= limit } else { end <= limit };
            prop_assert!(within);
            prop_assert!(end <= 0xa_0000 || start >= MIB);
            prop_assert!(taken.iter().all(|(s, e)| end <= *s || *e <= start));
            taken.push((start, end));
        }
    }
}

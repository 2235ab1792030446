//! Tests of the tables: structure, checksums, and what operating systems look for.

use super::*;
use crate::platform::SERIAL_PORTS;

fn config(apic_ids: &[u32]) -> AcpiConfig<'_> {
    AcpiConfig {
        apic_ids,
        ioapic_id: 0,
        serial_ports: &SERIAL_PORTS[..2],
        keyboard: false,
        pci: PciLayout {
            mmio64: Some(1 << 36..1 << 37),
            ..PciLayout::default()
        },
    }
}

const BASE: Gpa = Gpa(0xe_0000);

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, &b| sum.wrapping_add(b))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn at(tables: &AcpiTables, address: u64) -> &[u8] {
    let found = tables.tables.iter().find(|(gpa, _)| gpa.0 == address);
    &found.expect("a pointer to a table").1
}

/// Follows the pointers from the RSDP, through the XSDT.
fn find<'a>(tables: &'a AcpiTables, signature: &[u8; 4]) -> &'a [u8] {
    let rsdp = at(tables, tables.rsdp.0);
    let xsdt = at(tables, u64_at(rsdp, 24));
    let entries = xsdt[36..].chunks(8).map(|c| at(tables, u64_at(c, 0)));
    let mut matching = entries.filter(|t| &t[..4] == signature);
    matching.next().expect("the table is listed")
}

#[test]
fn structure_and_checksums() {
    let tables = build(&config(&[0, 1]), BASE).unwrap();
    assert_eq!(tables.rsdp, BASE);
    let rsdp = at(&tables, BASE.0);
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((sum(&rsdp[..20]), sum(rsdp), rsdp[15]), (0, 0, 2));
    let mut end = BASE.0;
    for (gpa, bytes) in &tables.tables {
        assert!(gpa.0 >= end && gpa.is_aligned(64));
        end = gpa.0 + bytes.len() as u64;
        if &bytes[..4] != b"FACS" && *gpa != tables.rsdp {
            assert_eq!(sum(bytes), 0, "{:?}", &bytes[..4]);
            assert_eq!(u32_at(bytes, 4) as usize, bytes.len());
        }
    }
    assert!(end <= tables.end.0);
    let rsdt = at(&tables, u64::from(u32_at(rsdp, 16)));
    let xsdt = at(&tables, u64_at(rsdp, 24));
    let narrow: Vec<u64> = rsdt[36..]
        .chunks(4)
        .map(|c| u64::from(u32_at(c, 0)))
        .collect();
    let wide: Vec<u64> = xsdt[36..].chunks(8).map(|c| u64_at(c, 0)).collect();
    assert_eq!(narrow, wide);
}

#[test]
fn hpet_is_where_its_table_says() {
    let tables = build(&config(&[0]), BASE).unwrap();
    let hpet = find(&tables, b"HPET");
    assert_eq!(hpet.len(), 56);
    assert_eq!(u32_at(hpet, 36), HPET_ID);
    assert_eq!(&hpet[40..44], [0, 64, 0, 0]);
    assert_eq!(u64_at(hpet, 44), HPET_BASE);
}

#[test]
fn fadt_describes_the_fixed_hardware() {
    let tables = build(&config(&[0]), BASE).unwrap();
    let fadt = find(&tables, b"FACP");
    assert_eq!((fadt.len(), fadt[8]), (276, 6));
    assert_eq!(&at(&tables, u64::from(u32_at(fadt, 36)))[..4], b"FACS");
    assert_eq!(&at(&tables, u64_at(fadt, 132))[..4], b"FACS");
    assert_eq!(&at(&tables, u64_at(fadt, 140))[..4], b"DSDT");
    assert_eq!(fadt[46], 9);
    assert_eq!(u32_at(fadt, 48), 0, "no SMI: always in ACPI mode");
    assert_eq!(u32_at(fadt, 56), 0x600);
    assert_eq!(u32_at(fadt, 64), 0x604);
    assert_eq!(u32_at(fadt, 76), 0x608);
    assert_eq!(fadt[108], 0x32);
    assert_eq!(fadt[109], 0x15, "legacy devices, no VGA, no ASPM, no 8042");
    assert_eq!(fadt[116..120], [1, 8, 0, 1]);
    assert_eq!((u64_at(fadt, 120), fadt[128]), (0xcf9, 6));
    let with_keyboard = AcpiConfig {
        keyboard: true,
        ..config(&[0])
    };
    let tables = build(&with_keyboard, BASE).unwrap();
    assert_eq!(find(&tables, b"FACP")[109], 0x17);
}

/// MADT entries as (type, bytes).
fn madt_entries(tables: &AcpiTables) -> Vec<(u8, Vec<u8>)> {
    let mut rest = &find(tables, b"APIC")[44..];
    let mut entries = Vec::new();
    while !rest.is_empty() {
        let length = usize::from(rest[1]);
        entries.push((rest[0], rest[..length].to_vec()));
        rest = &rest[length..];
    }
    entries
}

#[test]
fn madt_lists_processors_and_overrides() {
    let tables = build(&config(&[0, 2, 255, 300]), BASE).unwrap();
    let madt = find(&tables, b"APIC");
    assert_eq!((u32_at(madt, 36), u32_at(madt, 40)), (0xfee0_0000, 1));
    let entries = madt_entries(&tables);
    let kinds: Vec<u8> = entries.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(kinds, [0, 0, 9, 9, 1, 2, 2, 4, 10]);
    assert_eq!(entries[1].1[2..], [1, 2, 1, 0, 0, 0]);
    assert_eq!(u32_at(&entries[3].1, 4), 300);
    assert_eq!(u32_at(&entries[3].1, 12), 3);
    assert_eq!(u32_at(&entries[4].1, 4), 0xfec0_0000);
    assert_eq!(entries[5].1[3..], [0, 2, 0, 0, 0, 0, 0]);
    assert_eq!(entries[6].1[3..], [9, 9, 0, 0, 0, 0xd, 0]);
    assert_eq!(entries[7].1[2..], [0xff, 0, 0, 1]);
    let tables = build(&config(&[0, 1]), BASE).unwrap();
    assert!(madt_entries(&tables).iter().all(|(kind, _)| *kind != 10));
}

#[test]
fn mcfg_names_the_ecam_of_bus_0() {
    let tables = build(&config(&[0]), BASE).unwrap();
    let mcfg = find(&tables, b"MCFG");
    assert_eq!(mcfg.len(), 60);
    assert_eq!(u64_at(mcfg, 44), 0xe000_0000);
    assert_eq!(mcfg[52..56], [0, 0, 0, 0]);
}

#[test]
fn bad_bases_are_refused() {
    for base in [0x1001, 1 << 32, (1 << 32) - 64, !63] {
        assert_eq!(build(&config(&[0]), Gpa(base)), Err(BadBase(Gpa(base))));
    }
    let many: Vec<u32> = (0..1024).collect();
    let tables = build(&config(&many), Gpa(0x10_0000)).unwrap();
    assert!(tables.end.0 - 0x10_0000 < 1 << 17);
}

/// Writes each table to the directory that PLINTH_ACPI_DUMP names, for a look with iasl.
#[test]
#[ignore = "development aid: needs PLINTH_ACPI_DUMP"]
fn dump() {
    let directory = std::env::var("PLINTH_ACPI_DUMP").expect("PLINTH_ACPI_DUMP names a directory");
    let with_keyboard = AcpiConfig {
        keyboard: true,
        ..config(&[0, 1, 255])
    };
    for (gpa, bytes) in build(&with_keyboard, BASE).unwrap().tables {
        let name = String::from_utf8_lossy(&bytes[..4]).trim().to_string();
        std::fs::write(format!("{directory}/{name}-{gpa}.aml"), bytes).unwrap();
    }
}

/// Carries a loader script out, as firmware does.
fn load(files: LoaderFiles, places: [u64; 2]) -> AcpiTables {
    let [rsdp, tables, (_, script)] = files;
    let mut files = [rsdp, tables];
    let text = |bytes: &[u8]| {
        let end = bytes.iter().position(|&b| b == 0).unwrap();
        String::from_utf8(bytes[..end].to_vec()).unwrap()
    };
    let index = |files: &[(&str, Vec<u8>); 2], bytes: &[u8]| {
        let name = text(bytes);
        files.iter().position(|(known, _)| *known == name).unwrap()
    };
    let mut allocated = [false; 2];
    assert_eq!(script.len() % 128, 0);
    for step in script.chunks(128) {
        let file = index(&files, &step[4..60]);
        match u32_at(step, 0) {
            1 => {
                let alignment = u64::from(u32_at(step, 60));
                assert!(places[file].is_multiple_of(alignment));
                allocated[file] = true;
            }
            2 => {
                let pointee = index(&files, &step[60..116]);
                assert!(allocated[file] && allocated[pointee]);
                let (at, size) = (u32_at(step, 116) as usize, usize::from(step[120]));
                let field = &mut files[file].1[at..at + size];
                let mut value = [0; 8];
                value[..size].copy_from_slice(field);
                let value = u64::from_le_bytes(value) + places[pointee];
                field.copy_from_slice(&value.to_le_bytes()[..size]);
            }
            3 => {
                let [result, start, length] = [60, 64, 68].map(|at| u32_at(step, at) as usize);
                let bytes = &mut files[file].1;
                assert_eq!(bytes[result], 0);
                bytes[result] = checksum(&bytes[start..start + length]);
            }
            other => panic!("step {other}"),
        }
    }
    // Take the tables apart again.
    let [(_, rsdp), (_, tables)] = files;
    let end = Gpa(places[1] + tables.len() as u64);
    let mut parts = vec![(Gpa(places[0]), rsdp)];
    let mut at = 0;
    while at < tables.len() {
        let length = u32_at(&tables, at + 4) as usize;
        parts.push((Gpa(places[1] + at as u64), tables[at..at + length].to_vec()));
        at = (at + length).next_multiple_of(64);
    }
    let facs = parts.iter().find(|(_, table)| table.starts_with(b"FACS"));
    AcpiTables {
        rsdp: Gpa(places[0]),
        facs: facs.map(|(at, _)| *at).unwrap(),
        tables: parts,
        end,
    }
}

#[test]
fn firmware_places_the_same_tables_elsewhere() {
    let config = config(&[0, 1]);
    // At the place that `build` would choose, all is the same to the byte.
    let built = build(&config, BASE).unwrap();
    let loaded = load(loader_files(&config).unwrap(), [BASE.0, BASE.0 + 64]);
    assert_eq!(loaded.tables, built.tables);
    assert_eq!(loaded.facs, built.facs);
    // Elsewhere, all that changes is pointers and sums.
    let tables = load(loader_files(&config).unwrap(), [0xf_1230, 0x7f_e000]);
    let rsdp = at(&tables, 0xf_1230);
    assert_eq!((sum(&rsdp[..20]), sum(rsdp)), (0, 0));
    for signature in [b"FACP", b"APIC", b"MCFG"] {
        assert_eq!(sum(find(&tables, signature)), 0);
    }
    let fadt = find(&tables, b"FACP");
    assert_eq!(&at(&tables, u64::from(u32_at(fadt, 40)))[..4], b"DSDT");
    assert_eq!(u64_at(fadt, 132), u64::from(u32_at(fadt, 36)));
}

#[test]
fn without_ecam_there_is_no_mcfg() {
    let mut config = config(&[0]);
    config.pci.ecam = None;
    let tables = build(&config, BASE).unwrap();
    assert!(tables.tables.iter().all(|(_, t)| &t[..4] != b"MCFG"));
}

//! Tests of nested tables: both formats, over fake memory.

use super::*;
use crate::fake::FakeMemory;
use proptest::prelude::*;
use std::collections::BTreeMap;

const OWNER: Owner = Owner::VmTables(1);
const EPT: Ept = Ept {
    pages_2m: true,
    pages_1g: true,
    execute_only: false,
    accessed_dirty: false,
};
const NPT: Npt = Npt { pages_1g: true };

fn memory(frames: u64) -> &'static FakeMemory {
    Box::leak(Box::new(FakeMemory::new(frames * PAGE_SIZE)))
}

#[test]
fn ept_entries_are_encoded_as_the_manual_says() {
    let page = Hpa(0x1234_5000);
    let wb = EPT.leaf(page, PageSize::Size4K, Rights::ALL, MemoryType::WriteBack);
    assert_eq!(wb, 0x1234_5037);
    let page = Hpa(0x4000_0000);
    let uc = EPT.leaf(
        page,
        PageSize::Size2M,
        Rights::READ,
        MemoryType::Uncacheable,
    );
    assert_eq!(uc, 0x4000_00c1);
    assert_eq!(EPT.table(Hpa(0x7000)), 0x7007);
    assert_eq!(EPT.pointer(Hpa(0x7000)), 0x701e);
    let with_ad = Ept {
        accessed_dirty: true,
        ..EPT
    };
    assert_eq!(with_ad.pointer(Hpa(0x7000)), 0x705e);
}

#[test]
fn npt_entries_are_encoded_as_the_manual_says() {
    let page = Hpa(0x1234_5000);
    let wb = NPT.leaf(page, PageSize::Size4K, Rights::ALL, MemoryType::WriteBack);
    assert_eq!(wb, 0x1234_5007);
    let page = Hpa(0x4000_0000);
    let uc = NPT.leaf(
        page,
        PageSize::Size1G,
        Rights::READ,
        MemoryType::Uncacheable,
    );
    assert_eq!(uc, 0x8000_0000_4000_009d);
    assert_eq!(NPT.table(Hpa(0x7000)), 0x7007);
}

#[test]
fn rights_that_entries_cannot_carry_are_refused() {
    let write_only = Rights {
        read: false,
        write: true,
        execute: false,
    };
    let execute_only = Rights {
        read: false,
        write: false,
        execute: true,
    };
    let none = Rights {
        read: false,
        write: false,
        execute: false,
    };
    let capable = Ept {
        execute_only: true,
        ..EPT
    };
    assert!(capable.can_express(execute_only) && !EPT.can_express(execute_only));
    for rights in [write_only, none] {
        assert!(!capable.can_express(rights) && !NPT.can_express(rights));
        let mut table = NestedTable::new(EPT, memory(8), OWNER).unwrap();
        assert_eq!(
            table.map(Gpa(0), Hpa(0), PAGE_SIZE, rights, MemoryType::WriteBack),
            Err(NestedError::RightsNotSupported(rights))
        );
    }
}

fn largest_pages<F: EntryFormat>(format: F, largest: PageSize) {
    let mut table = NestedTable::new(format, memory(64), OWNER).unwrap();
    // Both addresses are 1 GiB-aligned at 1 GiB, and 2 MiB of lead-in precede that.
    let (gpa, hpa) = (
        Gpa(PAGE_SIZE_1G - PAGE_SIZE_2M),
        Hpa(3 * PAGE_SIZE_1G - PAGE_SIZE_2M),
    );
    let bytes = PAGE_SIZE_2M + PAGE_SIZE_1G + PAGE_SIZE;
    table
        .map(gpa, hpa, bytes, Rights::ALL, MemoryType::WriteBack)
        .unwrap();
    let size = |at: Gpa| table.translate(at).map(|(to, _, size)| (to - hpa, size));
    assert_eq!(
        size(gpa + 0x1234),
        Some((0x1234, PageSize::Size2M.min(largest)))
    );
    assert_eq!(size(Gpa(PAGE_SIZE_1G)), Some((PAGE_SIZE_2M, largest)),);
    assert_eq!(size(gpa + (bytes - 1)), Some((bytes - 1, PageSize::Size4K)));
    assert_eq!(size(gpa + bytes), None);
}

#[test]
fn the_largest_pages_are_used() {
    largest_pages(EPT, PageSize::Size1G);
    largest_pages(NPT, PageSize::Size1G);
    largest_pages(Npt { pages_1g: false }, PageSize::Size2M);
    largest_pages(
        Ept {
            pages_1g: false,
            ..EPT
        },
        PageSize::Size2M,
    );
}

#[test]
fn misaligned_addresses_get_small_pages() {
    let mut table = NestedTable::new(NPT, memory(8), OWNER).unwrap();
    table
        .map(
            Gpa(0),
            Hpa(PAGE_SIZE),
            PAGE_SIZE_2M,
            Rights::ALL,
            MemoryType::WriteBack,
        )
        .unwrap();
    assert_eq!(
        table.translate(Gpa(0)),
        Some((Hpa(PAGE_SIZE), Rights::ALL, PageSize::Size4K))
    );
}

#[test]
fn bad_ranges_are_refused_by_name() {
    let mut table = NestedTable::new(NPT, memory(8), OWNER).unwrap();
    let mut map = |gpa, hpa, bytes| {
        table.map(
            Gpa(gpa),
            Hpa(hpa),
            bytes,
            Rights::ALL,
            MemoryType::WriteBack,
        )
    };
    for (gpa, hpa, bytes) in [(1, 0, 4096), (0, 1, 4096), (0, 0, 4095)] {
        let gpa_typed = Gpa(gpa);
        assert_eq!(
            map(gpa, hpa, bytes),
            Err(NestedError::Unaligned {
                gpa: gpa_typed,
                bytes
            })
        );
    }
    let beyond = [
        (GPA_LIMIT, 0, 4096),
        (GPA_LIMIT - 4096, 0, 8192),
        (!4095, 0, 4096),
        (0, HPA_LIMIT, 4096),
        (0, !4095, 4096),
    ];
    for (gpa, hpa, bytes) in beyond {
        let gpa_typed = Gpa(gpa);
        assert_eq!(
            map(gpa, hpa, bytes),
            Err(NestedError::BeyondLimit {
                gpa: gpa_typed,
                bytes
            })
        );
    }
    assert_eq!(table.translate(Gpa(GPA_LIMIT)), None);
    assert_eq!(table.frames(), 1);
}

#[test]
fn a_failed_map_changes_nothing() {
    // Root and three tables fit; the second 2 MiB of small pages doesn't.
    let host = memory(4);
    let mut table = NestedTable::new(NPT, host, OWNER).unwrap();
    let error = table.map(
        Gpa(0),
        Hpa(PAGE_SIZE),
        2 * PAGE_SIZE_2M,
        Rights::ALL,
        MemoryType::WriteBack,
    );
    assert_eq!(
        error,
        Err(NestedError::OutOfFrames(OutOfFrames { frames: 1 }))
    );
    assert_eq!(table.unmap(Gpa(0), GPA_LIMIT), Ok(0));
    table.reclaim();
    assert_eq!(table.frames(), 1);

    table
        .map(
            Gpa(0x5000),
            Hpa(0x9000),
            PAGE_SIZE,
            Rights::READ,
            MemoryType::WriteBack,
        )
        .unwrap();
    let error = table.map(
        Gpa(0x3000),
        Hpa(0x3000),
        4 * PAGE_SIZE,
        Rights::ALL,
        MemoryType::WriteBack,
    );
    assert_eq!(error, Err(NestedError::AlreadyMapped { gpa: Gpa(0x5000) }));
    assert_eq!(table.translate(Gpa(0x3000)), None);
    assert!(table.translate(Gpa(0x5000)).is_some());
}

#[test]
fn a_split_that_finds_no_frame_changes_nothing() {
    let host = memory(3);
    let mut table = NestedTable::new(NPT, host, OWNER).unwrap();
    let all = (Rights::ALL, MemoryType::WriteBack);
    table
        .map(Gpa(0), Hpa(0), PAGE_SIZE_1G, all.0, all.1)
        .unwrap();
    // A 4 KiB hole takes two tables; one frame is left.
    assert!(matches!(
        table.unmap(Gpa(PAGE_SIZE), PAGE_SIZE),
        Err(NestedError::OutOfFrames(_))
    ));
    assert!(matches!(
        table.protect(Gpa(PAGE_SIZE), PAGE_SIZE, Rights::READ),
        Err(NestedError::OutOfFrames(_))
    ));
    let (hpa, rights, _) = table.translate(Gpa(PAGE_SIZE)).unwrap();
    assert_eq!((hpa, rights), (Hpa(PAGE_SIZE), Rights::ALL));
}

#[test]
fn protect_refuses_holes() {
    let mut table = NestedTable::new(EPT, memory(8), OWNER).unwrap();
    let kind = MemoryType::Uncacheable;
    table
        .map(Gpa(0), Hpa(0), PAGE_SIZE, Rights::ALL, kind)
        .unwrap();
    assert_eq!(
        table.protect(Gpa(0), 2 * PAGE_SIZE, Rights::READ),
        Err(NestedError::NotMapped {
            gpa: Gpa(PAGE_SIZE)
        })
    );
    assert_eq!(table.translate(Gpa(0)).unwrap().1, Rights::ALL);
    table.protect(Gpa(0), PAGE_SIZE, Rights::READ).unwrap();
    assert_eq!(table.translate(Gpa(0)).unwrap().1, Rights::READ);
    assert_eq!(table.memory_type(Gpa(0)), Some(kind));
}

#[test]
fn all_frames_come_back() {
    let host = memory(64);
    let mut table = NestedTable::new(EPT, host, OWNER).unwrap();
    let kind = MemoryType::WriteBack;
    table
        .map(Gpa(0), Hpa(0), 2 * PAGE_SIZE_1G, Rights::ALL, kind)
        .unwrap();
    table.unmap(Gpa(PAGE_SIZE), PAGE_SIZE).unwrap();
    assert_eq!(host.used(OWNER), table.frames());
    table.unmap(Gpa(0), 2 * PAGE_SIZE_1G).unwrap();
    table.reclaim();
    assert_eq!((table.frames(), host.used(OWNER)), (1, 1));
    drop(table);
    assert_eq!(host.used(OWNER), 0);
}

/// One operation on the tables, in units of 4 KiB from the base of the window under test.
#[derive(Clone, Debug)]
enum Op {
    Map {
        gpa: u64,
        hpa: u64,
        pages: u64,
        rights: Rights,
        kind: MemoryType,
    },
    Unmap {
        gpa: u64,
        pages: u64,
    },
    Protect {
        gpa: u64,
        pages: u64,
        rights: Rights,
    },
    Reclaim,
}

/// Pages of the window: 2 GiB + 4 MiB, so that each page size occurs.
const WINDOW: u64 = 2 * 512 * 512 + 1024;

/// A page number, often just at or beside a multiple of a large page.
fn page() -> impl Strategy<Value = u64> {
    let near = |unit: u64| {
        (0..WINDOW / unit, 0..3u64).prop_map(move |(n, d)| (n * unit + d).saturating_sub(1))
    };
    prop_oneof![
        (0..WINDOW / 512).prop_map(|n| n * 512),
        (0..3u64).prop_map(|n| n * 512 * 512),
        near(512),
        near(512 * 512),
    ]
    .prop_map(|n| n.min(WINDOW - 1))
}

fn rights() -> impl Strategy<Value = Rights> {
    prop::sample::select(vec![
        Rights::ALL,
        Rights::READ,
        Rights::READ_EXECUTE,
        Rights::READ_WRITE,
    ])
}

fn length() -> impl Strategy<Value = u64> {
    prop_oneof![
        1..4u64,
        Just(512),
        Just(513),
        Just(1024),
        500..600u64,
        Just(512 * 512)
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let kind = prop::sample::select(vec![MemoryType::WriteBack, MemoryType::Uncacheable]);
    prop_oneof![
        4 => (page(), page(), length(), rights(), kind).prop_map(|(gpa, hpa, pages, rights, kind)| {
            Op::Map { gpa, hpa, pages: pages.min(WINDOW - gpa), rights, kind }
        }),
        3 => (page(), length()).prop_map(|(gpa, pages)| Op::Unmap { gpa, pages: pages.min(WINDOW - gpa) }),
        3 => (page(), length(), rights()).prop_map(|(gpa, pages, rights)| {
            Op::Protect { gpa, pages: pages.min(WINDOW - gpa), rights }
        }),
        1 => Just(Op::Reclaim),
    ]
}

/// The same by ranges: start page -> (pages, host page, rights, memory type), never overlapping.
#[derive(Default)]
struct Model(BTreeMap<u64, (u64, u64, Rights, MemoryType)>);

impl Model {
    fn at(&self, page: u64) -> Option<(u64, Rights, MemoryType)> {
        let (start, (pages, hpa, rights, kind)) = self.0.range(..=page).next_back()?;
        (page < start + pages).then_some((hpa + (page - start), *rights, *kind))
    }

    /// First page in the range that is (not) mapped.
    fn first(&self, from: u64, pages: u64, mapped: bool) -> Option<u64> {
        let mut at = from;
        while at < from + pages {
            let inside = self.at(at).is_some();
            if inside == mapped {
                return Some(at);
            }
            let next_start = self.0.range(at + 1..).next().map(|(s, _)| *s);
            at = if inside {
                let (s, r) = self.0.range(..=at).next_back().unwrap();
                s + r.0
            } else {
                next_start.unwrap_or(u64::MAX)
            };
        }
        None
    }

    fn cut(&mut self, at: u64) {
        let Some((&start, &(pages, hpa, rights, kind))) = self.0.range(..at).next_back() else {
            return;
        };
        if at < start + pages {
            let head = at - start;
            self.0.insert(start, (head, hpa, rights, kind));
            self.0.insert(at, (pages - head, hpa + head, rights, kind));
        }
    }

    fn take(&mut self, from: u64, pages: u64) -> u64 {
        self.cut(from);
        self.cut(from + pages);
        let keys: Vec<_> = self.0.range(from..from + pages).map(|(k, _)| *k).collect();
        keys.iter().map(|k| self.0.remove(k).unwrap().0).sum()
    }
}

fn follows_model<F: EntryFormat>(format: F, base: u64, ops: Vec<Op>, probes: Vec<u64>) {
    let host = memory(4096);
    let mut table = NestedTable::new(format, host, OWNER).unwrap();
    let mut model = Model::default();
    let gpa_of = |page: u64| Gpa(base + page * PAGE_SIZE);
    let mut edges = probes;
    for op in ops {
        match op {
            Op::Map {
                gpa,
                hpa,
                pages,
                rights,
                kind,
            } => {
                let bytes = pages * PAGE_SIZE;
                let got = table.map(gpa_of(gpa), Hpa(hpa * PAGE_SIZE), bytes, rights, kind);
                match model.first(gpa, pages, true) {
                    Some(page) => {
                        assert_eq!(got, Err(NestedError::AlreadyMapped { gpa: gpa_of(page) }));
                    }
                    None => {
                        assert_eq!(got, Ok(()));
                        model.0.insert(gpa, (pages, hpa, rights, kind));
                    }
                }
                edges.extend([gpa, gpa + pages]);
            }
            Op::Unmap { gpa, pages } => {
                let got = table.unmap(gpa_of(gpa), pages * PAGE_SIZE);
                assert_eq!(got, Ok(model.take(gpa, pages) * PAGE_SIZE));
                edges.extend([gpa, gpa + pages]);
            }
            Op::Protect { gpa, pages, rights } => {
                let got = table.protect(gpa_of(gpa), pages * PAGE_SIZE, rights);
                match model.first(gpa, pages, false) {
                    Some(page) => {
                        assert_eq!(got, Err(NestedError::NotMapped { gpa: gpa_of(page) }));
                    }
                    None => {
                        assert_eq!(got, Ok(()));
                        model.cut(gpa);
                        model.cut(gpa + pages);
                        for (_, range) in model.0.range_mut(gpa..gpa + pages) {
                            range.2 = rights;
                        }
                    }
                }
                edges.extend([gpa, gpa + pages]);
            }
            Op::Reclaim => table.reclaim(),
        }
        assert_eq!(table.frames(), host.used(OWNER));
        for page in edges.iter().flat_map(|e| [e.saturating_sub(1), *e, e + 1]) {
            let at = gpa_of(page) + 0xabc;
            let got = table
                .translate(at)
                .map(|(hpa, rights, _)| (hpa, rights, table.memory_type(at).unwrap()));
            let want = model
                .at(page)
                .map(|(hpa, rights, kind)| (Hpa(hpa * PAGE_SIZE + 0xabc), rights, kind));
            assert_eq!(got, want, "page {page:#x}");
        }
    }
    drop(table);
    assert_eq!(host.used(OWNER), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn ept_follows_the_model(
        ops in prop::collection::vec(op(), 1..24),
        probes in prop::collection::vec(page(), 8),
        pages_2m: bool,
    ) {
        let format = Ept { pages_2m, pages_1g: pages_2m, ..EPT };
        follows_model(format, 0, ops, probes);
    }

    #[test]
    fn npt_follows_the_model(
        ops in prop::collection::vec(op(), 1..24),
        probes in prop::collection::vec(page(), 8),
        pages_1g: bool,
    ) {
        // The window lies in the last 4 GiB below the 48-bit limit.
        follows_model(Npt { pages_1g }, GPA_LIMIT - (4 << 30), ops, probes);
    }
}

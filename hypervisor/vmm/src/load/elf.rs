//! ELF kernels: placing their segments by physical address, and reading their notes.

use alloc::vec::Vec;

use elf::ElfBytes;
use elf::abi::{EM_386, EM_X86_64, PF_X, PT_LOAD, PT_NOTE};
use elf::endian::LittleEndian;
use elf::note::Note;
use elf::parse::ParseError;
use elf::segment::ProgramHeader;
use mem::Gpa;

use super::{Job, LoadError, zero};

/// Most program headers of a kernel. Linux has 5.
const MAX_SEGMENTS: usize = 64;

pub(super) fn is_elf(image: &[u8]) -> bool {
    image.starts_with(b"\x7fELF")
}

/// Whether a file is ELF for 64 bits (EI_CLASS is ELFCLASS64).
pub(super) fn is_elf64(image: &[u8]) -> bool {
    is_elf(image) && image.get(4) == Some(&2)
}

/// A kernel's ELF file.
pub(super) struct Elf<'a> {
    file: ElfBytes<'a, LittleEndian>,
    segments: Vec<ProgramHeader>,
    image: &'a [u8],
}

/// What an ELF kernel takes up once loaded.
pub(super) struct Placed {
    /// Physical address of the ELF header's entry point.
    pub entry: u64,
    /// Loaded ranges, start and end.
    pub ranges: Vec<(u64, u64)>,
}

impl Placed {
    /// One past the last loaded byte.
    pub(super) fn end(&self) -> u64 {
        self.ranges.iter().map(|(_, end)| *end).max().unwrap_or(0)
    }

    /// Checks that an entry point lies in the kernel, and within 32 bits.
    pub(super) fn check_entry(&self, name: &'static str, entry: u64) -> Result<(), LoadError> {
        let inside = |(start, end): &(u64, u64)| (*start..*end).contains(&entry);
        if entry <= u64::from(u32::MAX) && self.ranges.iter().any(inside) {
            return Ok(());
        }
        Err(LoadError::BadField { name, value: entry })
    }
}

impl<'a> Elf<'a> {
    pub(super) fn parse(image: &'a [u8]) -> Result<Self, LoadError> {
        let bad = |e| error(&e, image);
        let file = ElfBytes::<LittleEndian>::minimal_parse(image).map_err(bad)?;
        if file.ehdr.e_machine != EM_X86_64 && file.ehdr.e_machine != EM_386 {
            return Err(LoadError::BadElf("not for x86"));
        }
        let table = file
            .segments()
            .ok_or(LoadError::BadElf("no program headers"))?;
        if table.len() > MAX_SEGMENTS {
            return Err(LoadError::BadField {
                name: "e_phnum",
                value: table.len() as u64,
            });
        }
        Ok(Elf {
            segments: table.iter().collect(),
            file,
            image,
        })
    }

    /// Places every loadable segment at its physical address, bss zeroed.
    pub(super) fn place(&self, job: &mut Job<'_>) -> Result<Placed, LoadError> {
        let mut ranges = Vec::new();
        let loadable = |s: &&ProgramHeader| s.p_type == PT_LOAD && s.p_memsz > 0;
        for segment in self.segments.iter().filter(loadable) {
            if segment.p_filesz > segment.p_memsz {
                return Err(LoadError::BadField {
                    name: "p_filesz",
                    value: segment.p_filesz,
                });
            }
            let data = self
                .file
                .segment_data(segment)
                .map_err(|e| error(&e, self.image))?;
            place_at(job, segment.p_paddr, data, segment.p_memsz)?;
            ranges.push((segment.p_paddr, segment.p_paddr + segment.p_memsz));
        }
        if ranges.is_empty() {
            return Err(LoadError::BadElf("nothing to load"));
        }
        Ok(Placed {
            entry: self.physical_entry(),
            ranges,
        })
    }

    /// The entry point, which kernels of the upper half give as a virtual address.
    fn physical_entry(&self) -> u64 {
        let entry = self.file.ehdr.e_entry;
        self.segments
            .iter()
            .filter(|s| s.p_type == PT_LOAD && s.p_flags & PF_X != 0)
            .find_map(|s| {
                let offset = entry.checked_sub(s.p_vaddr)?;
                let inside = offset < s.p_filesz;
                inside.then(|| s.p_paddr.wrapping_add(offset))
            })
            .unwrap_or(entry)
    }

    /// Content of the note with this name and type.
    pub(super) fn note(&self, name: &[u8], kind: u64) -> Option<&'a [u8]> {
        self.segments
            .iter()
            .filter(|segment| segment.p_type == PT_NOTE)
            .filter_map(|segment| self.file.segment_data_as_notes(segment).ok())
            .flatten()
            .find_map(|note| match note {
                Note::Unknown(note) if note.n_type == kind && note.name == name => Some(note.desc),
                _ => None,
            })
    }
}

/// Places `data` at `start`, and zeroes up to `bytes` bytes.
pub(super) fn place_at(
    job: &mut Job<'_>,
    start: u64,
    data: &[u8],
    bytes: u64,
) -> Result<(), LoadError> {
    let at = Gpa(start);
    if !job.space.take_at(start, bytes) {
        return Err(LoadError::PlaceTaken { start: at, bytes });
    }
    job.memory.write(at, data)?;
    let filled = data.len() as u64;
    zero(job.memory, at + filled, bytes.saturating_sub(filled))?;
    Ok(())
}

fn error(error: &ParseError, image: &[u8]) -> LoadError {
    match error {
        ParseError::SliceReadError((_, end)) => LoadError::CutShort {
            needs: *end as u64,
            has: image.len() as u64,
        },
        ParseError::UnsupportedElfEndianness(_) => LoadError::BadElf("not little-endian"),
        ParseError::UnsupportedVersion(_) | ParseError::UnsupportedElfClass(_) => {
            LoadError::BadElf("unknown class or version")
        }
        _ => LoadError::BadElf("damaged headers"),
    }
}

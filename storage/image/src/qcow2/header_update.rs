//! Replacing a header so that a power cut at any write leaves the old one or the new one.
//!
//! A disk writes 512 bytes as a whole, no more. All fields lie in the first sector; extensions and the name of the
//! backing file can reach beyond it. So what lies beyond is written first, to places that the old header does not use,
//! and the first sector switches. Where both want the same place, a header in between leaves out the table of feature
//! names, which only serves messages, and frees the place for the next step.

use super::header::EXT_FEATURE_NAMES;
use super::{Header, HeaderError};

const SECTOR: usize = 512;

/// Writes to the header area in steps: between two of them everything must reach stable storage, and after the last.
pub type HeaderSteps = Vec<Vec<(u64, Vec<u8>)>>;

/// Which bytes of a header area mean something.
struct Used {
    /// Fields, extensions and the end marker.
    fields_end: usize,
    /// Name of the backing file.
    name: std::ops::Range<usize>,
}

impl Used {
    fn of(header: &Header, name_at: usize) -> Result<Used, HeaderError> {
        let fields_end = header.fields_and_extensions().len();
        let name_bytes = header.backing_name.as_ref().map_or(0, String::len);
        Ok(Used { fields_end, name: name_at..name_at + name_bytes })
    }

    fn is_free(&self, range: &std::ops::Range<usize>) -> bool {
        let apart = |other: &std::ops::Range<usize>| range.end <= other.start || other.end <= range.start;
        range.is_empty() || (range.start >= self.fields_end && (self.name.is_empty() || apart(&self.name)))
    }
}

/// How to turn the header area `old_area`, which holds a header, into `new`. Where the first cluster has no room for
/// both names of backing files, a single step writes everything, and a power cut in it can mix old and new.
pub fn header_steps(old_area: &[u8], new: &Header) -> Result<HeaderSteps, HeaderError> {
    let compact = new.serialise()?;
    if compact.len() <= SECTOR || tail_is_same(old_area, &compact) {
        return Ok(vec![vec![(0, first_sector(compact))]]);
    }
    let old = Header::parse(old_area)?;
    let old_name_at = crate::be64(old_area, 8).map_or(0, |at| at as usize);
    let old_used = Used::of(&old, old_name_at)?;
    Ok(careful_steps(&old_used, new)?.unwrap_or_else(|| vec![vec![(0, compact)]]))
}

/// `None` where the places do not suffice.
fn careful_steps(old: &Used, new: &Header) -> Result<Option<HeaderSteps>, HeaderError> {
    let cluster_bytes = new.geometry.cluster_bytes() as usize;
    let between = Header {
        extensions: new.extensions.iter().filter(|ext| ext.kind != EXT_FEATURE_NAMES).cloned().collect(),
        ..new.clone()
    };
    let (between_end, new_end) = (between.fields_and_extensions().len(), new.fields_and_extensions().len());
    if between_end > SECTOR {
        return Ok(None);
    }
    let name_bytes = new.backing_name.as_ref().map_or(0, String::len);
    let behind_fields = old.fields_end.max(new_end).max(SECTOR).next_multiple_of(8);
    let behind_all = behind_fields.max(old.name.end).next_multiple_of(8);
    let without_features = old.fields_end.max(SECTOR).next_multiple_of(8);
    let candidates = [behind_fields, behind_all, between_end, without_features, old.name.end.max(SECTOR)];
    let place = candidates.into_iter().find(|at| {
        let name = *at..at + name_bytes;
        name.end <= SECTOR || (name.start >= SECTOR && name.end <= cluster_bytes && old.is_free(&name))
    });
    let Some(name_at) = place else { return Ok(None) };
    let with_features = name_at >= new_end && new_end <= cluster_bytes;
    let mut steps = HeaderSteps::new();
    let name = new.backing_name.clone().unwrap_or_default().into_bytes();
    if name_at >= SECTOR && !name.is_empty() {
        steps.push(vec![(name_at as u64, name)]);
    }
    steps.push(vec![(0, first_sector(between.serialise_with_name_at(name_at)?))]);
    if with_features && new_end > between_end {
        let full = new.serialise_with_name_at(name_at)?;
        if let Some(tail) = full.get(SECTOR..new_end).filter(|tail| !tail.is_empty()) {
            steps.push(vec![(SECTOR as u64, tail.to_vec())]);
        }
        steps.push(vec![(0, first_sector(full))]);
    }
    Ok(Some(steps))
}

/// Whether everything behind the first sector is in the file as the new header wants it.
fn tail_is_same(old_area: &[u8], compact: &[u8]) -> bool {
    old_area.get(SECTOR..compact.len()) == compact.get(SECTOR..)
}

fn first_sector(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.resize(SECTOR, 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::super::header::feature_names;
    use super::super::{CompressionType, CryptMethod, Extension, Geometry};
    use super::*;

    fn header(cluster_bits: u32, name: Option<&str>, extensions: Vec<Extension>) -> Header {
        Header {
            geometry: Geometry {
                cluster_bits,
                refcount_order: 4,
                version: 3,
                size_bytes: 1 << 20,
                extended_l2: false,
                data_file: false,
            },
            backing_name: name.map(str::to_owned),
            backing_format: name.map(|_| "qcow2".to_owned()),
            crypt_method: CryptMethod::None,
            l1_offset: 0x3_0000,
            l1_entries: 1024,
            reftable_offset: 0x1_0000,
            reftable_clusters: 1,
            snapshot_count: 0,
            snapshots_offset: 0,
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            compression: CompressionType::Zlib,
            extensions,
            extra: vec![0; 8],
        }
    }

    fn area(header: &Header) -> Vec<u8> {
        let mut area = header.serialise().unwrap();
        area.resize(header.geometry.cluster_bytes() as usize, 0);
        area
    }

    fn without_names(header: &Header) -> Header {
        let mut header = header.clone();
        header.extensions.retain(|ext| ext.kind != EXT_FEATURE_NAMES);
        header
    }

    /// Applies the steps one sector at a time: after each the old header or the new one is there, the table of feature
    /// names aside. Within a step the sectors arrive in any order.
    fn check_every_cut(old: &Header, start: &[u8], new: &Header) -> Vec<u8> {
        let steps = header_steps(start, new).unwrap();
        let mut done = start.to_vec();
        for writes in &steps {
            let sectors: Vec<(usize, Vec<u8>)> =
                writes.iter().flat_map(|(at, bytes)| sectors(*at as usize, bytes)).collect();
            assert!(sectors.len() <= 6, "a step of {} sectors", sectors.len());
            for subset in 0..1u32 << sectors.len() {
                let mut torn = done.clone();
                for (i, (at, bytes)) in sectors.iter().enumerate() {
                    if subset >> i & 1 == 1 {
                        torn[*at..at + bytes.len()].copy_from_slice(bytes);
                    }
                }
                let got = without_names(&Header::parse(&torn).unwrap());
                assert!(got == without_names(old) || got == without_names(new), "{old:?} to {new:?}: {got:?}");
            }
            for (at, bytes) in sectors {
                done[at..at + bytes.len()].copy_from_slice(&bytes);
            }
        }
        assert_eq!(&Header::parse(&done).unwrap(), new);
        done
    }

    fn sectors(at: usize, bytes: &[u8]) -> Vec<(usize, Vec<u8>)> {
        let first = SECTOR - at % SECTOR;
        let (head, rest) = bytes.split_at(first.min(bytes.len()));
        let rest = rest.chunks(SECTOR).enumerate().map(|(i, chunk)| (at + first + i * SECTOR, chunk.to_vec()));
        std::iter::once((at, head.to_vec())).chain(rest).collect()
    }

    #[test]
    fn a_cut_leaves_the_old_or_the_new_header() {
        let long = "x/".repeat(500);
        let names = [None, Some("a"), Some("base.qcow2"), Some("other-name-of-a-file.qcow2"), Some(long.as_str())];
        let bitmaps = Extension { kind: super::super::EXT_BITMAPS, data: vec![1; 24] };
        for extensions in [vec![], vec![feature_names()], vec![feature_names(), bitmaps]] {
            let mut now = header(16, None, vec![feature_names()]);
            let mut bytes = area(&now);
            // Each name after each other, so that places are used again and again.
            for i in 0..names.len() * names.len() {
                let new = header(16, names[i * 7 % names.len()], extensions.clone());
                bytes = check_every_cut(&now, &bytes, &new);
                now = new;
            }
        }
    }

    #[test]
    fn one_sector_is_one_write() {
        let old = header(9, Some("base"), vec![]);
        let new = Header { l1_offset: 0x9_0000, ..old.clone() };
        let steps = header_steps(&area(&old), &new).unwrap();
        assert_eq!(steps.len(), 1);
        assert_eq!(steps[0].len(), 1);
        check_every_cut(&old, &area(&old), &new);
        // The name lies behind the first sector and stays: still one write.
        let old = header(16, Some("base"), vec![feature_names()]);
        let new = Header { snapshot_count: 1, snapshots_offset: 0x9_0000, ..old.clone() };
        assert_eq!(header_steps(&area(&old), &new).unwrap().len(), 1);
        check_every_cut(&old, &area(&old), &new);
    }

    #[test]
    fn what_cannot_fit_is_refused_and_what_fits_once_is_written_at_once() {
        let old = header(10, Some(&"o".repeat(700)), vec![]);
        let new = header(10, Some(&"n".repeat(700)), vec![]);
        assert_eq!(header_steps(&area(&old), &new).unwrap().len(), 1);
        let new = header(9, Some(&"n".repeat(600)), vec![]);
        assert!(matches!(header_steps(&area(&old), &new), Err(HeaderError::DoesNotFit { .. })));
    }
}

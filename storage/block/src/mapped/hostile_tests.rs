//! Images that lie: every field of every table of every format takes extreme values, and files end anywhere.
//! Opening, reading, mapping and writing them may fail; it may not panic, hang, or take memory beyond reason.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use image::vhdx::Header;
use image::vhdx::header::{HEADER_OFFSETS, REGION_OFFSETS, REGION_TABLE_BYTES};

use super::tests::{Rng, create, open as open_file, qemu_img, source};
use crate::error::BlockError;
use crate::foreign::{ForeignImage, open_foreign};
use crate::io::FileBackend;
use crate::node::Node;
use crate::sys::{ReadBufs, WriteBufs};

const PAGE: u64 = 4096;

/// A sparse file in memory, over bytes that many of them share. A lie about offsets costs it nothing.
struct SparseFile {
    base: Arc<Vec<u8>>,
    changed: Mutex<(HashMap<u64, Vec<u8>>, u64)>,
}

impl SparseFile {
    fn over(base: &Arc<Vec<u8>>, patches: &[(usize, Vec<u8>)], len: usize) -> Arc<SparseFile> {
        let file = SparseFile { base: base.clone(), changed: Mutex::new((HashMap::new(), len as u64)) };
        for (offset, bytes) in patches {
            let len = file.changed.lock().unwrap().1;
            let bytes = &bytes[..bytes.len().min((len as usize).saturating_sub(*offset))];
            file.write_at(*offset as u64, &WriteBufs::from_slice(bytes)).unwrap();
        }
        Arc::new(file)
    }

    fn page(&self, number: u64) -> Vec<u8> {
        let start = usize::try_from(number * PAGE).unwrap_or(usize::MAX).min(self.base.len());
        let mut page = self.base[start..self.base.len().min(start + PAGE as usize)].to_vec();
        page.resize(PAGE as usize, 0);
        page
    }
}

impl FileBackend for SparseFile {
    fn read_at(&self, offset: u64, bufs: &ReadBufs<'_>) -> io::Result<()> {
        let changed = self.changed.lock().unwrap();
        let mut done = 0;
        while done < bufs.len() {
            let at = offset.checked_add(done as u64).ok_or(io::ErrorKind::InvalidInput)?;
            let within = (at % PAGE) as usize;
            let mut page = changed.0.get(&(at / PAGE)).cloned().unwrap_or_else(|| self.page(at / PAGE));
            // What lies behind the end is zeroes.
            let inside = changed.1.saturating_sub(at - within as u64).min(PAGE) as usize;
            page[inside..].fill(0);
            let part = bufs.range(done, PAGE as usize - within);
            part.copy_from(&page[within..]);
            done += part.len();
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, bufs: &WriteBufs<'_>) -> io::Result<()> {
        let mut changed = self.changed.lock().unwrap();
        let end = offset.checked_add(bufs.len() as u64).filter(|end| *end <= i64::MAX as u64);
        changed.1 = changed.1.max(end.ok_or(io::ErrorKind::InvalidInput)?);
        let mut done = 0;
        while done < bufs.len() {
            let at = offset + done as u64;
            let within = (at % PAGE) as usize;
            let page = changed.0.entry(at / PAGE).or_insert_with(|| self.page(at / PAGE));
            done += bufs.range(done, PAGE as usize - within).copy_to(&mut page[within..]);
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn punch_hole(&self, _offset: u64, _bytes: u64) -> io::Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _offset: u64, _bytes: u64, _may_unmap: bool) -> io::Result<()> {
        Ok(())
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.changed.lock().unwrap().1)
    }

    fn set_len_bytes(&self, bytes: u64) -> io::Result<()> {
        self.changed.lock().unwrap().1 = bytes;
        Ok(())
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.len_bytes()
    }
}

fn open(format: &str, file: Arc<SparseFile>, read_only: bool) -> Result<Arc<dyn Node>, BlockError> {
    let format = format.parse::<image::Format>().unwrap();
    open_foreign(ForeignImage::new(file, Path::new("memory"), format), read_only, false)
}

/// Does everything that a caller does, at the start, in the middle and at the end of the disk.
fn exercise(format: &str, file: impl Fn() -> Arc<SparseFile>) -> bool {
    let places = |node: &dyn Node| {
        let size = node.size_bytes();
        [0, size / 2 / 512 * 512, size.saturating_sub(4096)].into_iter().filter(move |at| at + 4096 <= size)
    };
    let opened = open(format, file(), true);
    if let Ok(node) = &opened {
        let mut room = [0; 4096];
        for at in places(&**node) {
            let _ = node.read(&[], at, &ReadBufs::from_slice(&mut room));
        }
        let mut at = 0;
        for _ in 0..32 {
            match node.extent(at, node.size_bytes() - at) {
                Ok(extent) if at + extent.bytes < node.size_bytes() => at += extent.bytes,
                _ => break,
            }
        }
        let _ = (node.allocated_bytes(), node.cluster_bytes(), node.backing_name());
    }
    if let Ok(node) = open(format, file(), false) {
        for at in places(&*node) {
            let _ = node.write(&[], at, &WriteBufs::from_slice(&[1; 4096]));
            let _ = node.write_zeroes(&[], at, 2048, true);
            let _ = node.discard(at, 4096);
        }
        let _ = node.flush();
    }
    opened.is_ok()
}

/// Changes bytes of an image at an offset, with what that entails: pieces and their offsets.
type Mend = fn(&[u8], usize, &[u8]) -> Vec<(usize, Vec<u8>)>;

/// An image under attack: where its tables are, and what mends its checksums.
struct Victim {
    format: &'static str,
    bytes: Arc<Vec<u8>>,
    tables: Vec<std::ops::Range<usize>>,
    mend: Mend,
}

fn as_it_is(_: &[u8], at: usize, patch: &[u8]) -> Vec<(usize, Vec<u8>)> {
    vec![(at, patch.to_vec())]
}

/// A patched copy of a part of the file.
fn part(bytes: &[u8], range: std::ops::Range<usize>, at: usize, patch: &[u8]) -> Vec<u8> {
    let mut out = bytes[range.clone()].to_vec();
    let end = (at + patch.len()).min(range.end);
    out[at - range.start..end - range.start].copy_from_slice(&patch[..end - at]);
    out
}

/// Footers and dynamic headers of vpc carry a sum.
fn mend_vpc(bytes: &[u8], at: usize, patch: &[u8]) -> Vec<(usize, Vec<u8>)> {
    let end = bytes.len() - 512;
    for (range, sum_at) in [(0..512, 64), (512..1536, 36), (end..bytes.len(), 64)] {
        if range.contains(&at) {
            let mut out = part(bytes, range.clone(), at, patch);
            out[sum_at..sum_at + 4].fill(0);
            let sum = !out.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
            out[sum_at..sum_at + 4].copy_from_slice(&sum.to_be_bytes());
            return vec![(range.start, out)];
        }
    }
    as_it_is(bytes, at, patch)
}

fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 != 0 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 })
    })
}

/// Headers, region tables and log entries of vhdx carry a CRC-32C; both copies of a part are changed.
fn mend_vhdx(bytes: &[u8], at: usize, patch: &[u8]) -> Vec<(usize, Vec<u8>)> {
    let [first, second] = HEADER_OFFSETS.map(|offset| offset as usize);
    let [regions, more] = REGION_OFFSETS.map(|offset| offset as usize);
    let log = 1 << 20;
    for (range, copy) in
        [(first..first + 4096, second), (regions..regions + REGION_TABLE_BYTES, more), (log..log + 8192, log)]
    {
        if range.contains(&at) {
            let mut out = part(bytes, range.clone(), at, patch);
            out[4..8].fill(0);
            let crc = crc32c(&out);
            out[4..8].copy_from_slice(&crc.to_le_bytes());
            return vec![(range.start, out.clone()), (copy, out)];
        }
    }
    as_it_is(bytes, at, patch)
}

/// Images of each format with a little data.
fn victims() -> Vec<Victim> {
    let dir = tempfile::tempdir().unwrap();
    let (raw, path) = (dir.path().join("a.raw"), dir.path().join("image"));
    std::fs::write(&raw, &source(3 << 20)[..(2 << 20) + 512]).unwrap();
    let convert = |format: &str, options: &str| {
        qemu_img(&["convert", "-f", "raw", "-O", format, "-o", options, raw.to_str().unwrap(), path.to_str().unwrap()]);
        Arc::new(std::fs::read(&path).unwrap())
    };
    let mut out = Vec::new();
    let mut add = |format, bytes, tables, mend| out.push(Victim { format, bytes, tables, mend });
    let sparse = convert("vmdk", "subformat=monolithicSparse");
    add(
        "vmdk",
        sparse,
        vec![0..80, 512..1000, 21 * 512..21 * 512 + 8, 22 * 512..22 * 512 + 64, 26 * 512..27 * 512 + 64],
        as_it_is,
    );
    let stream = convert("vmdk", "subformat=streamOptimized");
    let grain = stream.windows(4).position(|word| word[..3] == [0x78, 0x9c, 0xec]).unwrap_or(65536 + 12) - 12;
    add("vmdk", stream, vec![0..80, 26 * 512..26 * 512 + 8, 22 * 512..22 * 512 + 64, grain..grain + 64], as_it_is);
    let footer = footer_stream(&path);
    let end = footer.len();
    add("vmdk", footer, vec![0..80, end - 2560..end], as_it_is);
    add("vdi", convert("vdi", "static=off"), vec![0x40..0x50, 0x154..0x1c8, 512..560], as_it_is);
    let vpc = convert("vpc", "subformat=dynamic");
    let end = vpc.len();
    add("vpc", vpc, vec![0..84, 512..576, 1536..1600, end - 512..end - 428], mend_vpc);
    let fixed = convert("vpc", "subformat=fixed,force_size=on");
    let end = fixed.len();
    add("vpc", fixed, vec![end - 512..end - 448, end - 448..end - 428], mend_vpc);
    let vhdx = vhdx_with_log(&convert("vhdx", "block_size=1M"));
    let (header, regions, bat, metadata) = (64 << 10, 192 << 10, 2 << 20, 3 << 20);
    let tables = vec![
        0..8,
        header..header + 80,
        regions..regions + 80,
        bat..bat + 48,
        metadata..metadata + 192,
        metadata + 65536..metadata + 65536 + 48,
        1 << 20..(1 << 20) + 112,
        (1 << 20) + 4096..(1 << 20) + 4120,
    ];
    add("vhdx", vhdx, tables, mend_vhdx);
    out
}

/// A stream with its directory at the end, as we write it.
fn footer_stream(path: &Path) -> Arc<Vec<u8>> {
    std::fs::remove_file(path).unwrap();
    create("vmdk", "subformat=streamOptimized", path, 2 << 20);
    let node = open_file("vmdk", path, false).unwrap();
    node.write(&[], 0, &WriteBufs::from_slice(&source(1 << 20))).unwrap();
    node.flush().unwrap();
    drop(node);
    Arc::new(std::fs::read(path).unwrap())
}

/// The image with its log as it was before its last entry was applied.
fn vhdx_with_log(bytes: &[u8]) -> Arc<Vec<u8>> {
    let mut bytes = bytes.to_vec();
    let entry = (1 << 20..2 << 20).step_by(4096).filter(|at| bytes[*at..].starts_with(b"loge")).max().unwrap();
    let last = bytes[entry..entry + 8192].to_vec();
    bytes[1 << 20..2 << 20].fill(0);
    bytes[1 << 20..(1 << 20) + 8192].copy_from_slice(&last);
    // Its tail was where it stood.
    let moved = mend_vhdx(&bytes, (1 << 20) + 12, &[0; 4]);
    let (header, _) = Header::current(&bytes, bytes.len() as u64).unwrap();
    let header = Header { log_guid: last[32..48].try_into().unwrap(), ..header }.serialise();
    for (at, part) in moved.iter().cloned().chain(HEADER_OFFSETS.map(|at| (at as usize, header.clone()))) {
        bytes[at..at + part.len()].copy_from_slice(&part);
    }
    Arc::new(bytes)
}

#[test]
fn lying_fields() {
    let mut rng = Rng(77);
    for victim in victims() {
        let Victim { format, bytes, tables, mend } = victim;
        let whole = || SparseFile::over(&bytes, &[], bytes.len());
        assert!(exercise(format, whole), "{format}: the image itself opens");
        for at in tables.into_iter().flat_map(|range| range.step_by(2)) {
            let random = rng.next().to_le_bytes();
            let values: [&[u8]; 12] = [
                &[0],
                &[1],
                &[0xff],
                &[0, 0],
                &[0xff, 0xff],
                &[0, 0, 0, 0],
                &[0xff; 4],
                &[0xff, 0xff, 0xff, 0x7f],
                &[0x7f, 0xff, 0xff, 0xff],
                &[0xff; 8],
                &[0, 0, 0, 0, 0, 0, 0, 0x80],
                &random,
            ];
            for patch in values {
                let patch = &patch[..patch.len().min(bytes.len() - at)];
                let patches = mend(&bytes, at, patch);
                exercise(format, || SparseFile::over(&bytes, &patches, bytes.len()));
            }
        }
        for _ in 0..60 {
            let len = rng.below(bytes.len() as u64) as usize;
            exercise(format, || SparseFile::over(&bytes, &[], len));
        }
        for len in (0..8192).step_by(37).chain((0..4 << 20).step_by(65536)).filter(|len| *len < bytes.len()) {
            exercise(format, || SparseFile::over(&bytes, &[], len));
        }
    }
    if std::env::var_os("VIREO_REPORT_MEMORY").is_some() {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap().trim().to_owned();
        println!("peak: {peak}");
    }
}

/// The same in a process of its own, whose memory is measured. Its own images and tables take part of it.
#[test]
fn lies_cost_little_memory() {
    let run = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "mapped::hostile_tests::lying_fields", "--nocapture", "--test-threads=1"])
        .env("VIREO_REPORT_MEMORY", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success(), "{text}");
    let peak = text.split("peak: ").nth(1).and_then(|rest| rest.split_whitespace().next()).unwrap();
    let peak_kib: u64 = peak.parse().unwrap();
    assert!(peak_kib < 64 << 10, "{peak_kib} KiB");
}

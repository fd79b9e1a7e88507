//! Damaged and malicious images: an error or data, never a panic, with bounded memory and work. The mutations
//! are deterministic: a failure prints its seed.

mod support;

use block::{Disk, Format, OpenOptions, Repair, repair_backend};
use support::{MemFile, Pages, Rng, qemu_img};

const SIZE_BYTES: u64 = 1 << 20;

fn image(options: &str, compressed: bool) -> Pages {
    let dir = tempfile::tempdir().unwrap();
    let (raw, path) = (dir.path().join("a.raw"), dir.path().join("a.qcow2"));
    let data: Vec<u8> = (0..SIZE_BYTES).map(|i| if i % 5 == 0 { (i >> 9) as u8 } else { 3 }).collect();
    std::fs::write(&raw, data).unwrap();
    let mut args = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", options];
    if compressed {
        args.push("-c");
    }
    args.extend([raw.to_str().unwrap(), path.to_str().unwrap()]);
    qemu_img(&args);
    qemu_img(&["snapshot", "-c", "s", path.to_str().unwrap()]);
    if !options.contains("0.10") {
        qemu_img(&["bitmap", "--add", "-g", "4096", path.to_str().unwrap(), "b"]);
        qemu_img(&["bitmap", "--add", "--disable", path.to_str().unwrap(), "c"]);
    }
    Pages::load(&path)
}

/// Where mutations hurt most: header, tables, refcount blocks; and sometimes anywhere.
fn mutate(pages: &mut Pages, rng: &mut Rng) {
    let word = |pages: &Pages, at: u64| {
        let mut raw = [0; 8];
        pages.read(at, &mut raw);
        u64::from_be_bytes(raw)
    };
    // Where the directory of bitmaps is: the header extension of type 0x23852875.
    let bitmaps = |pages: &Pages| {
        let kind = |at: &u64| word(pages, *at) == 0x2385_2875 << 32 | 24;
        (104..800).step_by(8).find(kind).map_or(0, |at| word(pages, at + 24))
    };
    for _ in 0..1 + rng.below(3) {
        let l1 = word(pages, 40);
        let regions = [
            (0, 112),
            (l1, 64),
            (word(pages, 48), 64),
            (word(pages, word(pages, 48) & 0xff_ffff), 512),
            (word(pages, l1 & 0xff_ffff) & 0xff_ff00, 4096),
            (word(pages, 64), 128),
            (bitmaps(pages), 64),
            (word(pages, bitmaps(pages) & 0xff_ffff), 64),
            (0, pages.len),
        ];
        let (start, bytes) = regions[rng.below(regions.len() as u64) as usize];
        let at = (start & 0xff_ffff) + rng.below(bytes);
        match rng.below(5) {
            0 => pages.write(at, &[rng.next() as u8]),
            1 => pages.write(at & !7, &rng.next().to_be_bytes()),
            2 => pages.write(at & !7, &(rng.next() & 0x80ff_ffff_ffff_fe01).to_be_bytes()),
            3 => pages.write(at & !7, &[0xff; 8]),
            _ => {
                // An entry that exists elsewhere: overlaps and loops.
                let other = word(pages, (l1 & 0xff_ffff) + 8 * rng.below(8));
                pages.write(at & !7, &other.to_be_bytes());
            }
        }
    }
    if rng.below(12) == 0 {
        pages.len = rng.below(pages.len);
    }
}

/// Uses the image as a guest would; results do not matter.
fn exercise(pages: Pages, read_only: bool, rng: &mut Rng) -> bool {
    let file = MemFile::of(pages);
    let opts = OpenOptions { read_only, l2_cache_bytes: 64 << 10, ..OpenOptions::default() };
    let Ok(disk) = Disk::open_backends(vec![file.layer(Format::Qcow2)], &opts) else { return false };
    let size = disk.size_bytes();
    let mut buf = vec![0; 64 << 10];
    for _ in 0..24 {
        let bytes = (1 + rng.below(128) as usize) * 512;
        let offset = rng.below(size.min(SIZE_BYTES) / 512 + 1) * 512;
        let _ = disk.read(offset, &mut buf[..bytes]);
        match rng.below(4) {
            0 => _ = disk.write(offset, &buf[..bytes]),
            1 => _ = disk.write_zeroes(offset, bytes as u64, true),
            2 => _ = disk.discard(offset, bytes as u64),
            _ => _ = disk.flush(),
        }
    }
    let _ = disk.write(size.saturating_sub(512), &buf[..512]);
    if rng.below(10) == 0 {
        maintain(&disk, rng);
    }
    true
}

/// Operations on the image as a whole; results do not matter either.
fn maintain(disk: &Disk, rng: &mut Rng) {
    let Some(image) = disk.qcow2() else { return };
    let _ = image.snapshots();
    let _ = image.bitmaps();
    let _ = image.read_vm_state("s", 0, &mut [0; 4096]);
    for _ in 0..3 {
        match rng.below(10) {
            0 => _ = image.create_snapshot("new", &Default::default()),
            1 => _ = image.apply_snapshot("s"),
            2 => _ = image.delete_snapshot("s"),
            3 => _ = disk.resize(rng.below(4 << 20), true, block::Preallocation::Off),
            4 => _ = disk.resize(SIZE_BYTES + rng.below(4 << 20), true, block::Preallocation::Metadata),
            5 => _ = image.set_backing(Some("base"), Some("raw")),
            7 => _ = image.bitmap_bits("b").and_then(|bits| image.merge_bitmap("c", &bits)),
            8 => _ = image.add_bitmap("new", 512, true),
            9 => _ = image.remove_bitmap("b"),
            _ => _ = image.make_empty(),
        }
    }
}

#[test]
fn mutated_images_do_no_harm() {
    let seeds = [
        ("cluster_size=4k", false),
        ("cluster_size=64k,compression_type=zstd", true),
        ("cluster_size=512,refcount_bits=2", false),
        ("cluster_size=4k,compat=0.10", true),
        ("cluster_size=2M,lazy_refcounts=on", false),
        ("cluster_size=16k,extended_l2=on", false),
    ];
    let mut opened = 0;
    for (options, compressed) in seeds {
        let base = image(options, compressed);
        for seed in 1..=400u64 {
            let mut rng = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let mut pages = base.clone();
            if seed % 4 == 0 {
                let mut bits = [0; 8];
                pages.read(72, &mut bits);
                pages.write(72, &(u64::from_be_bytes(bits) | 1).to_be_bytes()); // dirty: the rebuild sees it too
            }
            mutate(&mut pages, &mut rng);
            let what = format!("{options} seed {seed}");
            let copy = MemFile::of(pages.clone());
            let what_to_mend = if seed % 2 == 0 { Repair::All } else { Repair::Leaks };
            let mended =
                std::panic::catch_unwind(move || repair_backend(copy.layer(Format::Qcow2), what_to_mend).is_ok());
            assert!(mended.is_ok(), "{what}: the repair panicked");
            let result = std::panic::catch_unwind(move || exercise(pages, seed % 3 == 0, &mut rng));
            opened += u32::from(result.unwrap_or_else(|_| panic!("{what}: panicked")));
        }
    }
    assert!(opened > 300, "only {opened} of 2000 mutated images opened: the mutations are too coarse to test much");
}

#[test]
fn truncated_images_do_no_harm() {
    let base = image("cluster_size=4k", false);
    for step in 0..200 {
        let mut pages = base.clone();
        pages.len = base.len * step / 200;
        let kept = pages.len;
        pages.zero(kept, base.len - kept);
        exercise(pages, step % 2 == 0, &mut Rng(step + 1));
    }
}

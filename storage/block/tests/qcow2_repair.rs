//! Checks and repairs against qemu-img: the same verdict before, none left after, and data that stays.

mod support;

use std::path::Path;

use block::{ChainFile, Format, OpenOptions, Repair, Repaired, check_image, repair_image};
use support::{MemFile, Pages, open_chain, open_disk, qemu_check, qemu_img, qemu_img_status, qemu_raw};

const SIZE_BYTES: u64 = 2 << 20;

const OPTIONS: [&str; 6] = [
    "cluster_size=64k",
    "cluster_size=4k,refcount_bits=8",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=4k,compat=0.10",
    "cluster_size=4k,refcount_bits=2",
    "cluster_size=16k,extended_l2=on",
];

/// An image with data, some of it shared with a snapshot and some not.
fn image(path: &Path, options: &str) -> Pages {
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), &SIZE_BYTES.to_string()]);
    let pattern = |seed: u64| -> Vec<u8> { (0..SIZE_BYTES / 2).map(|i| (i / 60 + seed) as u8 | 1).collect() };
    open_disk(path).write(0, &pattern(1)).unwrap();
    qemu_img(&["snapshot", "-c", "s", path.to_str().unwrap()]);
    open_disk(path).write(SIZE_BYTES / 4, &pattern(2)).unwrap();
    Pages::load(path)
}

fn word(pages: &Pages, at: u64) -> u64 {
    let mut raw = [0; 8];
    pages.read(at, &mut raw);
    u64::from_be_bytes(raw)
}

fn put(pages: &mut Pages, at: u64, value: u64) {
    pages.write(at, &value.to_be_bytes());
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Where things are in an image.
struct Places {
    l1: u64,
    /// The first L2 table.
    l2: u64,
    /// Offset of the L2 entry of the first cluster, which a snapshot shares, and of one that is not shared.
    shared: u64,
    owned: u64,
    reftable: u64,
    refblock: u64,
    refcount_bytes: u64,
    cluster_bits: u64,
}

fn places(pages: &Pages) -> Places {
    let l1 = word(pages, 40);
    let l2 = word(pages, l1) & OFFSET;
    let cluster_bits = word(pages, 16) & 0xff;
    let entries = (1u64 << cluster_bits) / 8;
    let owned = (0..entries).map(|i| l2 + i * 8).find(|at| word(pages, *at) >> 63 == 1);
    let reftable = word(pages, 48);
    let order = if word(pages, 0) & 0xff == 2 { 4 } else { word(pages, 96) >> 32 };
    Places {
        l1,
        l2,
        shared: l2,
        // With tiny clusters the first table maps only what is shared: another table has the owned ones.
        owned: owned.unwrap_or_else(|| {
            let table = (0..64).map(|i| word(pages, l1 + i * 8)).find(|raw| {
                let table = raw & OFFSET;
                table != 0 && (0..entries).any(|i| word(pages, table + i * 8) >> 63 == 1)
            });
            let table = table.unwrap() & OFFSET;
            (0..entries).map(|i| table + i * 8).find(|at| word(pages, *at) >> 63 == 1).unwrap()
        }),
        reftable,
        refblock: word(pages, reftable) & OFFSET,
        refcount_bytes: (1 << order) / 8,
        cluster_bits,
    }
}

/// Where an L2 entry of nothing is; in a first table that is full, that of a cluster that a snapshot shares.
fn unallocated(pages: &Pages) -> u64 {
    let Places { l2, cluster_bits, .. } = places(pages);
    let extended = word(pages, 0) & 0xff > 2 && word(pages, 72) & 16 != 0;
    let entry_bytes = if extended { 16 } else { 8 };
    let empty = (l2..l2 + (1 << cluster_bits)).step_by(entry_bytes);
    empty.filter(|at| word(pages, *at) == 0 && word(pages, at + entry_bytes as u64 - 8) == 0).last().unwrap_or(l2)
}

/// Sets the refcount of a cluster in the first block, for widths of whole bytes.
fn set_refcount(pages: &mut Pages, cluster: u64, count: u64) {
    let at = places(pages);
    let bytes = count.to_be_bytes();
    pages.write(at.refblock + cluster * at.refcount_bytes, &bytes[8 - at.refcount_bytes as usize..]);
}

fn chain_file(path: &Path, writable: bool) -> ChainFile {
    let file = support::open_file(path, writable);
    ChainFile { file, path_label: path.to_owned(), format: Format::Qcow2, extents: Vec::new() }
}

fn repair(path: &Path, what: Repair) -> Repaired {
    repair_image(chain_file(path, true), what).unwrap()
}

/// qemu-img's verdict: exit code, corruptions, leaks.
fn qemu_verdict(path: &Path) -> (i32, u64, u64) {
    let (status, text) = qemu_img_status(&["check", "-f", "qcow2", "--output=json", path.to_str().unwrap()]);
    let number = |key: &str| {
        let rest = text.split(&format!("\"{key}\": ")).nth(1).unwrap_or("0");
        rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
    };
    (status, number("corruptions"), number("leaks"))
}

type Damage = (&'static str, fn(&mut Pages), bool);

/// Ways to hurt an image, and whether the guest's data survives a repair.
const DAMAGES: &[Damage] = &[
    (
        "a refcount too low",
        |p| {
            let c = word(p, places(p).owned) & OFFSET;
            set_refcount(p, c >> places(p).cluster_bits, 0)
        },
        true,
    ),
    (
        "a refcount too high",
        |p| {
            let c = word(p, places(p).owned) & OFFSET;
            set_refcount(p, c >> places(p).cluster_bits, 3)
        },
        true,
    ),
    (
        "an L2 table without refcount",
        |p| {
            let c = places(p).l2;
            set_refcount(p, c >> places(p).cluster_bits, 0)
        },
        true,
    ),
    (
        "a leaked cluster",
        |p| {
            let cluster = p.len >> places(p).cluster_bits;
            p.len = (cluster + 1) << places(p).cluster_bits;
            set_refcount(p, cluster, 1);
        },
        true,
    ),
    (
        "a flag missing",
        |p| {
            let at = places(p).owned;
            let v = word(p, at);
            put(p, at, v & !(1 << 63))
        },
        true,
    ),
    (
        "a flag too many",
        |p| {
            let at = places(p).shared;
            let v = word(p, at);
            put(p, at, v | 1 << 63)
        },
        true,
    ),
    (
        "the flag of an L2 table missing",
        |p| {
            let at = places(p).l1;
            let v = word(p, at);
            put(p, at, v & !(1 << 63))
        },
        true,
    ),
    (
        "an entry past the end",
        |p| {
            let at = places(p).owned;
            put(p, at, 1 << 63 | 1 << 40)
        },
        false,
    ),
    (
        "an entry that is not aligned",
        |p| {
            let at = places(p).owned;
            let v = word(p, at);
            put(p, at, v | 1 << 9)
        },
        false,
    ),
    (
        "an L1 entry past the end",
        |p| {
            let at = places(p).l1;
            put(p, at, 1 << 63 | 1 << 40)
        },
        false,
    ),
    (
        "a lost refcount block",
        |p| {
            let at = places(p).reftable;
            put(p, at, 0)
        },
        true,
    ),
    (
        "a refcount block past the end",
        |p| {
            let at = places(p).reftable;
            put(p, at, 1 << 40)
        },
        true,
    ),
    (
        "a refcount block in the data",
        |p| {
            let at = places(p).reftable;
            let d = word(p, places(p).shared) & OFFSET;
            put(p, at, d)
        },
        true,
    ),
    (
        "a reserved bit of an L2 entry",
        |p| {
            let at = places(p).owned;
            let v = word(p, at);
            put(p, at, v | 1 << 61)
        },
        true,
    ),
    (
        "a reserved bit of an L2 entry that maps nothing",
        |p| {
            let at = unallocated(p);
            let v = word(p, at);
            put(p, at, v | 2)
        },
        true,
    ),
    (
        "a reserved bit of an L1 entry",
        |p| {
            let at = places(p).l1;
            let v = word(p, at);
            put(p, at, v | 1 << 61)
        },
        true,
    ),
    (
        "a reserved bit of the refcount table",
        |p| {
            let at = places(p).reftable;
            let v = word(p, at);
            put(p, at, v | 4)
        },
        true,
    ),
    (
        "nothing but the mark of damage",
        |p| {
            let v = word(p, 72);
            put(p, 72, v | 2)
        },
        true,
    ),
    (
        "nothing but the dirty mark",
        |p| {
            let v = word(p, 72);
            put(p, 72, v | 1)
        },
        true,
    ),
];

#[test]
fn damage_is_found_as_qemu_finds_it_and_mended() {
    for options in OPTIONS {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        let good = image(&path, options);
        let data = qemu_raw(&path);
        for (name, damage, keeps) in DAMAGES {
            let sub_byte = options.contains("refcount_bits=2")
                && (name.contains("refcount too") || name.contains("leaked") || name.contains("without refcount"));
            let no_marks = options.contains("0.10") && name.contains("mark");
            // 2 bits are no whole bytes; in 512-byte clusters a block covers only the first few.
            let tiny = options.contains("cluster_size=512")
                && (name.contains("refcount too") || name.contains("leaked") || name.contains("without"));
            if sub_byte || no_marks || tiny {
                continue;
            }
            let what = format!("{options}: {name}");
            let mut pages = good.clone();
            damage(&mut pages);
            pages.store(&path);
            let (status, corruptions, leaks) = qemu_verdict(&path);
            let ours = check_image(&path).unwrap();
            let our_status = if ours.corruptions > 0 {
                2
            } else if ours.leaks > 0 {
                3
            } else {
                0
            };
            assert_eq!(our_status, status, "{what}: {ours:?}, qemu-img {corruptions} and {leaks}");
            let repaired = repair(&path, Repair::All);
            assert_eq!((repaired.after.corruptions, repaired.after.leaks), (0, 0), "{what}: {repaired:?}");
            assert_eq!(repaired.corruptions_fixed, ours.corruptions, "{what}");
            qemu_check(&path, &what);
            if *keeps {
                assert!(qemu_raw(&path) == data, "{what}");
            }
            let again = std::fs::read(&path).unwrap();
            repair(&path, Repair::All);
            assert!(std::fs::read(&path).unwrap() == again, "{what}: a second repair wrote something");
            // And a guest can use it.
            let disk = open_disk(&path);
            disk.write(0, &[5; 4096]).unwrap();
            disk.write(SIZE_BYTES - 4096, &[6; 4096]).unwrap();
            drop(disk);
            qemu_check(&path, &format!("{what}, written after"));
        }
    }
}

/// Offset of the snapshot table, whose only entry has 24 bytes of extra data.
fn snapshot_table(pages: &Pages) -> u64 {
    let table = word(pages, 64);
    assert_eq!(word(pages, table + 32) & 0xffff_ffff, 24);
    table
}

#[test]
fn a_snapshot_without_its_sizes_gets_them() {
    for options in ["cluster_size=64k", "cluster_size=4k,refcount_bits=2", "cluster_size=16k,extended_l2=on"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        let mut pages = image(&path, options);
        let table = snapshot_table(&pages);
        let mut names = [0; 2];
        pages.read(table + 64, &mut names);
        pages.write(table + 36, &[0; 4]);
        pages.write(table + 40, &names);
        pages.store(&path);
        assert_eq!(qemu_verdict(&path), (2, 1, 0));
        assert_eq!(check_image(&path).unwrap().findings, ["ERROR snapshot table entry 0 is incomplete"]);
        assert_eq!(repair(&path, Repair::Leaks).after.corruptions, 1, "that is no leak");
        let repaired = repair(&path, Repair::All);
        assert_eq!((repaired.corruptions_fixed, repaired.after.corruptions, repaired.after.leaks), (1, 0, 0));
        qemu_check(&path, options);
        qemu_img(&["snapshot", "-a", "s", path.to_str().unwrap()]);
    }
}

#[test]
fn a_snapshot_whose_table_is_nowhere_stays_for_a_better_day() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let mut pages = image(&path, "cluster_size=64k");
    let table = snapshot_table(&pages);
    let l1 = word(&pages, table);
    put(&mut pages, table, l1 + 0x18);
    pages.store(&path);
    let before = std::fs::read(&path).unwrap();
    assert_eq!(qemu_verdict(&path).0, 2);
    let checked = check_image(&path).unwrap();
    let want = format!("ERROR snapshot 1 (s) l1_offset={:#x}: L1 table is not cluster aligned", l1 + 0x18);
    assert!(checked.findings[0].starts_with(&want), "{:?}", checked.findings);
    // All that is left of it are counts of clusters that nobody seems to use: QEMU calls them leaks.
    assert_eq!(checked.leaks, 0);
    for what in [Repair::Leaks, Repair::All] {
        assert!(repair(&path, what).after.corruptions > 0);
        assert!(std::fs::read(&path).unwrap() == before, "{what:?}");
    }
    let open = |read_only: bool| block::Qcow2Image::open(chain_file(&path, !read_only), read_only);
    assert_eq!(open(true).unwrap().snapshots().unwrap()[0].name, b"s");
    let error = open(false).unwrap().delete_snapshot("s").unwrap_err().to_string();
    assert!(error.ends_with("the image is damaged"), "{error}");
}

#[test]
fn a_compressed_cluster_that_says_it_is_owned_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let (source, path) = (dir.path().join("s.qcow2"), dir.path().join("a.qcow2"));
    image(&source, "cluster_size=64k");
    qemu_img(&["convert", "-c", "-O", "qcow2", source.to_str().unwrap(), path.to_str().unwrap()]);
    let data = qemu_raw(&path);
    let mut pages = Pages::load(&path);
    let l2 = word(&pages, word(&pages, 40)) & OFFSET;
    let entry = word(&pages, l2);
    put(&mut pages, l2, entry | 1 << 63);
    pages.store(&path);
    assert_eq!(qemu_verdict(&path), (2, 1, 0));
    let checked = check_image(&path).unwrap();
    assert!(checked.findings[0].ends_with("copied flag must never be set for compressed clusters"));
    assert_eq!((checked.corruptions, repair(&path, Repair::All).after.corruptions), (1, 0));
    qemu_check(&path, "compressed");
    assert!(qemu_raw(&path) == data);
}

#[test]
fn a_bitmap_directory_of_another_length_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    image(&path, "cluster_size=64k");
    qemu_img(&["bitmap", "--add", path.to_str().unwrap(), "b0"]);
    let good = Pages::load(&path);
    assert_eq!(check_image(&path).unwrap().corruptions, 0);
    let extension = (104..4096).find(|at| word(&good, *at) == 0x2385_2875_0000_0018).unwrap();
    let bytes = word(&good, extension + 16);
    for wrong in [bytes + 8, bytes + 30000, 8] {
        let mut pages = good.clone();
        put(&mut pages, extension + 16, wrong);
        pages.store(&path);
        let checked = check_image(&path).unwrap();
        assert!(checked.findings[0].contains("bitmap directory"), "{wrong}: {:?}", checked.findings);
    }
    let table = word(&good, word(&good, extension + 24));
    let mut pages = good.clone();
    put(&mut pages, table, 1 << 61);
    pages.store(&path);
    assert_eq!(qemu_verdict(&path).0 != 0, check_image(&path).unwrap().corruptions > 0);
}

#[test]
fn leaks_alone_are_mended_and_damage_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let good = image(&path, "cluster_size=64k");
    let mut pages = good.clone();
    let at = places(&pages);
    let (owned, shared) = (word(&pages, at.owned) & OFFSET, word(&pages, at.shared) & OFFSET);
    set_refcount(&mut pages, owned >> 16, 7);
    pages.store(&path);
    assert_eq!(qemu_verdict(&path).0, 2, "the owner says 1");
    let mut both = good.clone();
    set_refcount(&mut both, owned >> 16, 0);
    let end = both.len >> 16;
    both.len += 65536;
    set_refcount(&mut both, end, 2);
    both.store(&path);
    let repaired = repair(&path, Repair::Leaks);
    assert_eq!((repaired.leaks_fixed, repaired.corruptions_fixed), (1, 0));
    assert_eq!(qemu_verdict(&path).2, 0);
    // A cluster counted for a snapshot that is gone: its owner gets the flag back with the count.
    let mut pages = good;
    set_refcount(&mut pages, shared >> 16, 9);
    pages.store(&path);
    assert_eq!(repair(&path, Repair::Leaks).after.leaks, 0);
    qemu_check(&path, "a snapshot's leak");
}

#[test]
fn statistics_are_qemus() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    for (options, compress) in [("cluster_size=64k", false), ("cluster_size=4k", true), ("cluster_size=512", false)] {
        image(&path, options);
        let disk = open_disk(&path);
        for at in [5u64, 3, 9, 1] {
            disk.write(at * 200_000 / 512 * 512, &vec![3; 70_000 / 512 * 512]).unwrap();
        }
        if compress {
            let mut packed = Vec::new();
            assert!(disk.pack(&[1; 4096], &mut packed).unwrap());
            disk.write_packed(8192, &packed, 4096).unwrap();
        }
        drop(disk);
        let text = qemu_img(&["check", "-f", "qcow2", "--output=json", path.to_str().unwrap()]);
        let number = |key: &str| -> u64 {
            let rest = text.split(&format!("\"{key}\": ")).nth(1).unwrap_or("0");
            rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
        };
        let ours = check_image(&path).unwrap();
        assert_eq!(ours.allocated_clusters, number("allocated-clusters"), "{options} {text}");
        assert_eq!(ours.fragmented_clusters, number("fragmented-clusters"), "{options} {text}");
        assert_eq!(ours.compressed_clusters, number("compressed-clusters"), "{options} {text}");
        assert_eq!(ours.total_clusters, number("total-clusters"), "{options} {text}");
        assert_eq!(ours.image_end_bytes, number("image-end-offset"), "{options} {text}");
    }
}

#[test]
fn a_cut_in_a_repair_leaves_an_image_that_a_repair_mends() {
    for options in ["cluster_size=4k,refcount_bits=8", "cluster_size=512,refcount_bits=64"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        let good = image(&path, options);
        let data = qemu_raw(&path);
        for (name, damage, keeps) in
            DAMAGES.iter().filter(|(name, _, _)| name.contains("block") || name.contains("flag"))
        {
            let mut start = good.clone();
            damage(&mut start);
            let mark = word(&start, 72) | 2;
            put(&mut start, 72, mark);
            let file = MemFile::of(start.clone());
            block::repair_backend(file.layer(Format::Qcow2), Repair::All).unwrap();
            let log = file.0.lock().unwrap().log.clone();
            support::every_cut(&start, &log, &mut |torn, cut, closer| {
                let marked = word(torn, 72) & 2 != 0;
                let found = torn.check();
                assert!(marked || found.corruptions == 0, "{options} {name} {cut}: {:?}", found.findings);
                if !closer {
                    return;
                }
                torn.store(&path);
                repair(&path, Repair::All);
                qemu_check(&path, &format!("{options} {name} {cut}"));
                if *keeps {
                    let opts = OpenOptions { read_only: true, ..OpenOptions::default() };
                    let disk = open_chain(&[(&path, Format::Qcow2)], &opts);
                    assert!(support::contents(&disk) == data, "{options} {name} {cut}");
                }
            });
        }
    }
}

//! A third opinion: images after random operations by this tool and QEMU's are read by the crate imago, which shares no
//! code with either; it then changes them, and both tools find nothing wrong and see what it wrote.

#[path = "support/model.rs"]
mod model;

use std::ops::Range;
use std::path::Path;

use imago::file::File;
use imago::format::PreallocateMode;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::vmdk::Vmdk;
use imago::{FormatAccess, FormatCreateBuilder, FormatDriverBuilder, PermissiveImplicitOpenGate};
use model::{Kind, Model, OURS, SECTOR, SIZE, alone, has_peer, over_base, seeds};

const READS: &[Kind] = &[
    alone("raw", "preallocation=off"),
    alone("qcow2", "cluster_size=64k"),
    alone("qcow2", "cluster_size=4k,refcount_bits=32"),
    alone("qcow2", "cluster_size=512,compat=0.10"),
    alone("qcow2", "cluster_size=32k"),
    alone("qcow2", "cluster_size=4k,refcount_bits=64,preallocation=metadata"),
    over_base("cluster_size=4k,refcount_bits=8"),
    over_base("cluster_size=1k,compat=0.10"),
    over_base("cluster_size=64k,lazy_refcounts=on"),
];

/// What imago does not read, and what it says.
const REFUSES: &[(&str, &str)] =
    &[("compression_type=zstd", "compression type"), ("extended_l2=on", "extended L2 entries")];

fn open(path: &Path, format: &str, write: bool) -> FormatAccess<File> {
    let gate = PermissiveImplicitOpenGate::default();
    if format == "raw" {
        return FormatAccess::new(Raw::<File>::builder_path(path).write(write).open(gate).unwrap());
    }
    FormatAccess::new(Qcow2::<File>::builder_path(path).write(write).open(gate).unwrap())
}

/// What the image shows to imago is what the model holds.
fn judge(model: &Model) {
    let disk = open(&model.path("image"), model.kind.format, false);
    let mut seen = vec![0; model.data.len()];
    assert_eq!(disk.size(), seen.len() as u64, "{}", model.done.join("\n"));
    disk.read(&mut seen[..], 0).unwrap();
    let differs = seen.iter().zip(&model.data).position(|(seen, held)| seen != held);
    assert_eq!(differs, None, "{}: contents for imago", model.done.join("\n"));
}

fn write(disk: &FormatAccess<File>, model: &mut Model, range: Range<usize>, pattern: u8) {
    disk.write(&vec![pattern; range.len()][..], range.start as u64).unwrap();
    model.data[range].fill(pattern);
}

/// Changes by imago.
fn change(model: &mut Model, steps: usize) {
    let mut disk = open(&model.path("image"), model.kind.format, true);
    // In version 2, which has no clusters of zeroes, it only writes.
    let only_writes = model.kind.options.contains("0.10");
    for _ in 0..steps {
        let sectors = model.data.len() / SECTOR;
        let longest = [1, 9, 300, 2000][model.below(4)];
        let start = model.below(sectors);
        let count = (1 + model.below(longest)).min(sectors - start);
        let range = start * SECTOR..(start + count) * SECTOR;
        let (at, bytes) = (range.start as u64, range.len() as u64);
        let (act, pattern) = (model.below(6), 1 + model.below(255) as u8);
        model.done.push(format!("imago {act} {at} {bytes} {pattern}"));
        match act {
            _ if only_writes => write(&disk, model, range, pattern),
            0 => {
                disk.write_zeroes(at, bytes).unwrap();
                model.data[range].fill(0);
            }
            1 => {
                disk.discard_to_zero(at, bytes).unwrap();
                model.data[range].fill(0);
            }
            2 if model.snapshots.is_empty() && model.kind.format == "qcow2" => {
                let new = SIZE - 65_536 * model.below(8) + 65_536 * model.below(8);
                let grown = PreallocateMode::Zero;
                model.done.push(format!("imago resize {new}"));
                disk.resize(new as u64, grown).unwrap();
                model.data.resize(new, 0);
            }
            _ => write(&disk, model, range, pattern),
        }
    }
    disk.flush().unwrap();
}

#[test]
fn imago_reads_what_we_write_and_writes_what_we_read() {
    if !has_peer() {
        return;
    }
    for kind in READS {
        for seed in seeds(4) {
            let mut model = Model::new(*kind, seed);
            // It drops the bitmaps of an image that it changes, and leaks what they took.
            model.bitmaps_max = 0;
            for _ in 0..3 {
                for step in 0..5 {
                    if step % 3 == 2 { model.maintain() } else { model.request() }
                }
                judge(&model);
                change(&mut model, 6);
                model.judge();
                judge(&model);
            }
            model.judge_snapshots();
        }
    }
}

#[test]
fn imago_reads_flat_vmdks() {
    if !has_peer() {
        return;
    }
    for subformat in ["monolithicFlat", "twoGbMaxExtentFlat"] {
        let mut model = Model::new(alone("raw", "preallocation=off"), 7);
        (0..10).for_each(|_| model.request());
        let options = format!("subformat={subformat}");
        model.succeed(OURS, &["convert", "-f", "raw", "-O", "vmdk", "-o", &options, "image", "a.vmdk"]);
        let gate = PermissiveImplicitOpenGate::default();
        let disk = FormatAccess::new(Vmdk::<File>::builder_path(model.path("a.vmdk")).open(gate).unwrap());
        let mut seen = vec![0; model.data.len()];
        assert_eq!(disk.size(), seen.len() as u64);
        disk.read(&mut seen[..], 0).unwrap();
        assert!(seen == model.data, "{subformat}: {}", model.done.join("\n"));
    }
}

#[test]
fn imago_says_what_it_does_not_read() {
    for (options, says) in REFUSES {
        let kind = alone("qcow2", options);
        let mut model = Model::new(kind, 1);
        model.request();
        let gate = PermissiveImplicitOpenGate::default();
        let refused = Qcow2::<File>::builder_path(model.path("image")).open(gate).err().unwrap().to_string();
        assert!(refused.contains(says), "{options}: {refused}");
    }
}

#[test]
fn images_that_imago_creates_are_good() {
    if !has_peer() {
        return;
    }
    for (cluster, refcount, preallocate) in [
        (512, 1, PreallocateMode::None),
        (4096, 64, PreallocateMode::FormatAllocate),
        (65_536, 16, PreallocateMode::WriteData),
        (2 << 20, 8, PreallocateMode::Zero),
    ] {
        let kind = alone("qcow2", "cluster_size=64k");
        let mut model = Model::new(kind, cluster as u64);
        let file =
            std::fs::File::options().read(true).write(true).create(true).truncate(true).open(model.path("image"));
        let file: File = file.unwrap().try_into().unwrap();
        let made = Qcow2::<File>::create_builder(file).size(SIZE as u64).preallocate(preallocate);
        made.cluster_size(cluster).refcount_width(refcount).create().unwrap();
        model.done.push(format!("created by imago: {cluster} {refcount} {preallocate:?}"));
        model.judge();
        model.io("write -P 7 1000000 300000");
        model.data[1_000_000..1_300_000].fill(7);
        change(&mut model, 6);
        model.judge();
    }
}

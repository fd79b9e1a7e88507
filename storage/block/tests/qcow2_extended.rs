//! Extended L2 entries: subclusters written, zeroed and discarded, against qemu-img and an in-memory model.

mod support;

use std::path::Path;

use block::{Disk, Format, OpenOptions};
use support::{Rng, open_chain, qemu_check, qemu_img, qemu_raw};

const SIZE_BYTES: u64 = (3 << 20) + 512;

fn steps(disk: &Disk, model: &mut [u8], rng: &mut Rng, count: usize) {
    for step in 0..count {
        let longest = [1, 8, 40, 400][rng.below(4) as usize];
        let start = rng.below(SIZE_BYTES / 512);
        let sectors = (1 + rng.below(longest)).min(SIZE_BYTES / 512 - start);
        let (at, bytes) = (start * 512, sectors * 512);
        let range = at as usize..(at + bytes) as usize;
        match rng.below(8) {
            0 | 1 => {
                disk.write_zeroes(at, bytes, rng.below(2) == 0).unwrap();
                model[range].fill(0);
            }
            2 => {
                disk.discard(at, bytes).unwrap();
                let mut now = vec![0; bytes as usize];
                disk.read(at, &mut now).unwrap();
                for (index, (have, was)) in now.iter().zip(&mut model[range]).enumerate() {
                    assert!(*have == *was || *have == 0, "step {step}: byte {index} after a discard at {at}");
                    *was = *have;
                }
            }
            _ => {
                let data: Vec<u8> = (0..bytes).map(|i| (i / 90 + step as u64) as u8 | 1).collect();
                disk.write(at, &data).unwrap();
                model[range].copy_from_slice(&data);
            }
        }
        if step % 40 == 39 {
            disk.flush().unwrap();
        }
    }
}

fn run(dir: &Path, options: &str, backing: bool, seed: u64) {
    let (path, base) = (dir.join("a.qcow2"), dir.join("base.raw"));
    let mut model = vec![0; SIZE_BYTES as usize];
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", options];
    let size = SIZE_BYTES.to_string();
    if backing {
        model = (0..SIZE_BYTES).map(|i| (i / 777) as u8).collect();
        std::fs::write(&base, &model).unwrap();
        args.extend(["-b", "base.raw", "-F", "raw"]);
    }
    args.extend([path.to_str().unwrap(), &size]);
    qemu_img(&args);
    let mut files = vec![(path.as_path(), Format::Qcow2)];
    if backing {
        files.push((base.as_path(), Format::Raw));
    }
    let mut rng = Rng(seed);
    for round in 0..4 {
        let disk = open_chain(&files, &OpenOptions::default());
        steps(&disk, &mut model, &mut rng, 150);
        assert!(support::contents(&disk) == model, "{options} backing {backing} round {round}");
        if round == 1 {
            // From here on clusters are shared.
            disk.qcow2().unwrap().create_snapshot("s", &Default::default()).unwrap();
        }
        drop(disk);
        qemu_check(&path, &format!("{options} round {round}"));
        assert!(qemu_raw(&path) == model, "{options} backing {backing} round {round}");
        // And qemu's own writes are understood.
        let at = rng.below(SIZE_BYTES / 512) * 512;
        let out = std::process::Command::new("qemu-io")
            .args([
                "-f",
                "qcow2",
                "-c",
                &format!("write -P 99 {at} 512"),
                "-c",
                "write -z 1M 5k",
                "-c",
                "discard 2M 64k",
            ])
            .arg(&path)
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        model = qemu_raw(&path);
        assert_eq!(model[at as usize], 99, "{options} round {round}");
        let opts = OpenOptions { read_only: true, ..OpenOptions::default() };
        assert!(support::contents(&open_chain(&files, &opts)) == model, "{options} round {round}, by qemu-io");
    }
}

#[test]
fn subclusters_hold_what_the_model_holds() {
    for (options, seed) in [
        ("extended_l2=on,cluster_size=16k", 11),
        ("extended_l2=on,cluster_size=64k,refcount_bits=64", 12),
        ("extended_l2=on,cluster_size=128k,lazy_refcounts=on", 13),
        ("extended_l2=on,cluster_size=2M,compression_type=zstd", 14),
    ] {
        for backing in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            run(dir.path(), options, backing, seed);
        }
    }
}

#[test]
fn one_sector_takes_one_subcluster() {
    let dir = tempfile::tempdir().unwrap();
    let (path, base) = (dir.path().join("a.qcow2"), dir.path().join("base.raw"));
    std::fs::write(&base, vec![1; 1 << 20]).unwrap();
    let name = path.to_str().unwrap();
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "extended_l2=on,cluster_size=128k",
        "-b",
        "base.raw",
        "-F",
        "raw",
        name,
    ]);
    let files = [(path.as_path(), Format::Qcow2), (base.as_path(), Format::Raw)];
    let disk = open_chain(&files, &OpenOptions::default());
    disk.write(131_072 + 5 * 4096 + 512, &[7; 512]).unwrap();
    let extent = |at: u64| disk.extent(at, (1 << 20) - at).unwrap();
    assert_eq!((extent(0).depth, extent(0).extent.bytes), (1, 131_072 + 5 * 4096));
    assert_eq!((extent(131_072 + 5 * 4096).depth, extent(131_072 + 5 * 4096).extent.bytes), (0, 4096));
    disk.write_zeroes(131_072, 8192, true).unwrap();
    assert_eq!((extent(131_072).depth, extent(131_072).extent.bytes), (0, 8192));
    drop(disk);
    let map = qemu_img(&["map", "--output=json", "-f", "qcow2", name]);
    let starts: Vec<&str> =
        map.lines().map(|line| line.split("\"start\": ").nth(1).unwrap().split(',').next().unwrap()).collect();
    assert_eq!(starts, ["0", "131072", "139264", "151552", "155648"], "{map}");
}

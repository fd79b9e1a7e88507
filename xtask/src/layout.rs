//! `layout`: which functions of the image tool its usual commands run, so that they are linked side by side.
//!
//! The host maps a program in windows of 64 KiB. The half megabyte that a command runs lies in most of the windows of the
//! four and a half that are linked: in order of use, a command touches a quarter of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::bench::make_disk;
use crate::packages::{self, Consent};
use crate::programs;
use crate::run::{root, run, say, target};

/// Size of the disk that the commands work on: enough of each kind of data.
const DISK_MIB: u64 = 64;

/// What makes the images that the commands read.
const PREPARED: &[&str] = &[
    "convert -f raw -O qcow2 base.raw r.qcow2",
    "convert -c -f raw -O qcow2 base.raw z.qcow2",
    "convert -c -f raw -O qcow2 -o compression_type=zstd base.raw zs.qcow2",
    "convert -f raw -O vmdk -o subformat=streamOptimized base.raw s.vmdk",
    "create -q -f qcow2 -b r.qcow2 -F qcow2 w.qcow2",
    "create -q -f qcow2 e.qcow2 64M",
];

/// The usual commands, in an order in which each finds what it needs.
const USUAL: &[&str] = &[
    "info --output=json r.qcow2",
    "info w.qcow2",
    "check r.qcow2",
    "map --output=json w.qcow2",
    "measure -f raw -O qcow2 base.raw",
    "compare -f raw -F qcow2 base.raw r.qcow2",
    "create -f qcow2 new.qcow2 64M",
    "convert -f raw -O raw base.raw out.raw",
    "convert -f raw -O qcow2 base.raw out.qcow2",
    "convert -f qcow2 -O raw r.qcow2 out.raw",
    "convert -t none -T none -f qcow2 -O raw r.qcow2 out.raw",
    "convert -c -m 2 -f raw -O qcow2 base.raw out.qcow2",
    "convert -c -m 2 -f raw -O qcow2 -o compression_type=zstd base.raw out.qcow2",
    "convert -f qcow2 -O raw z.qcow2 out.raw",
    "convert -f qcow2 -O raw zs.qcow2 out.raw",
    "convert -f raw -O vmdk -o subformat=streamOptimized base.raw out.vmdk",
    "convert -f vmdk -O qcow2 s.vmdk out.qcow2",
    "convert -f raw -O vhdx base.raw out.vhdx",
    "snapshot -c s1 r.qcow2",
    "snapshot -a s1 r.qcow2",
    "snapshot -d s1 r.qcow2",
    "resize e.qcow2 128M",
    "bench -c 512 -d 16 -s 4096 -S 69632 -w -t writeback -f qcow2 e.qcow2",
    "bench -c 512 -d 16 -s 4096 -S 69632 -t none -f qcow2 r.qcow2",
    "bench -c 512 -d 16 -s 4096 -S 69632 -w --flush-interval=64 -t none -f qcow2 e.qcow2",
    // With an empty name.
    "rebase -f qcow2 -b {} w.qcow2",
    "create -q -f qcow2 -b r.qcow2 -F qcow2 top.qcow2",
    "commit -f qcow2 top.qcow2",
];
/// A server and its client, in the folder where `.` stands.
const SERVER: &str = "serve -r -f qcow2 -k ./nbd.sock r.qcow2";
const CLIENT: &str = "convert --image-opts -O raw driver=nbd,path=./nbd.sock,open-timeout=60 out.raw";

/// Runs the commands, and writes the linker script that [`programs::image_tool`] uses.
pub fn go(consent: Consent) -> Result<()> {
    packages::ensure(&[packages::BUILD, packages::TRACE], consent)?;
    let dir = target().join("layout");
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir)?;
    // Beside the program, which is not linked again when nothing has changed.
    let map = target().join("release/vireo-img.map");
    let tool = programs::image_tool_with_map(&map)?;
    let sections = sections(&fs::read_to_string(&map)?);
    make_disk(&dir.join("base.raw"), DISK_MIB)?;
    for args in PREPARED {
        run(Command::new(&tool).current_dir(&dir).args(args.split(' ')))?;
    }
    // By section: the commands that run it, a bit for each.
    let mut used: BTreeMap<u64, u64> = BTreeMap::new();
    let mut note = |index: usize, trace: &Path| -> Result<()> {
        for address in executed(&fs::read_to_string(trace)?, &tool) {
            let Some((start, section)) = sections.range(..=address).next_back() else { continue };
            if address < start + section.bytes {
                *used.entry(*start).or_default() |= 1 << index;
            }
        }
        Ok(())
    };
    for (index, args) in USUAL.iter().enumerate() {
        say(*args);
        let (mut child, trace) = traced(&dir, &tool, index, args)?;
        finish(&mut child, args)?;
        note(index, &trace)?;
    }
    say(SERVER);
    let (mut server, server_trace) = traced(&dir, &tool, USUAL.len(), SERVER)?;
    let (mut client, client_trace) = traced(&dir, &tool, USUAL.len() + 1, CLIENT)?;
    let served = finish(&mut client, CLIENT);
    if served.is_err() {
        let _ = server.kill();
    }
    let ended = finish(&mut server, SERVER);
    served.and(ended)?;
    note(USUAL.len(), &server_trace)?;
    note(USUAL.len() + 1, &client_trace)?;
    if used.is_empty() {
        bail!("valgrind told of no code of {} that ran", tool.display());
    }
    let script = root().join(programs::LAYOUT);
    fs::write(&script, script_of(&sections, &used)).with_context(|| format!("cannot write {}", script.display()))?;
    fs::remove_dir_all(&dir)?;
    let bytes: u64 = used.keys().filter_map(|start| sections.get(start)).map(|section| section.bytes).sum();
    println!("{}: {} pieces of code, {} KiB; the next build follows it", script.display(), used.len(), bytes >> 10);
    Ok(())
}

fn traced(dir: &Path, tool: &Path, index: usize, args: &str) -> Result<(Child, PathBuf)> {
    let trace = dir.join(format!("trace{index}"));
    let child = Command::new("valgrind")
        .args(["-q", "--tool=callgrind", "--dump-instr=yes", "--compress-pos=no", "--compress-strings=no"])
        .arg(format!("--callgrind-out-file={}", trace.display()))
        .arg(tool)
        .args(args.split(' ').map(|arg| match arg {
            "{}" => String::new(),
            _ => arg.replace("./", &format!("{}/", dir.display())),
        }))
        .current_dir(dir)
        .stdout(Stdio::null())
        .spawn()
        .context("cannot start valgrind")?;
    Ok((child, trace))
}

fn finish(child: &mut Child, args: &str) -> Result<()> {
    let status = child.wait()?;
    if !status.success() {
        bail!("vireo-img {args} failed: {status}");
    }
    Ok(())
}

/// Addresses of the instructions of `tool` that ran, from what callgrind wrote ("Callgrind Format Specification").
fn executed(trace: &str, tool: &Path) -> Vec<u64> {
    let (mut addresses, mut inside) = (Vec::new(), false);
    for line in trace.lines() {
        if let Some(object) = line.strip_prefix("ob=") {
            inside = Path::new(object) == tool;
        } else if let Some(cost) = line.strip_prefix("0x").filter(|_| inside) {
            let digits = cost.split(' ').next().unwrap_or_default();
            addresses.extend(u64::from_str_radix(digits, 16));
        }
    }
    addresses
}

/// A piece of code that the linker places as one.
struct Section {
    bytes: u64,
    /// How a linker script names it.
    pattern: String,
}

/// By address, from the linker's map: address, load address, size, alignment, and `file:(section)`.
fn sections(map: &str) -> BTreeMap<u64, Section> {
    let mut sections = BTreeMap::new();
    for line in map.lines() {
        let mut fields = line.split_whitespace();
        let mut number = || fields.next().and_then(|field| u64::from_str_radix(field, 16).ok());
        let (Some(address), Some(_), Some(bytes), Some(_)) = (number(), number(), number(), number()) else { continue };
        let Some((file, name)) = fields.next().and_then(|place| place.strip_suffix(')')?.split_once(":(")) else {
            continue;
        };
        if let Some(pattern) = pattern(file, name).filter(|_| bytes > 0) {
            sections.insert(address, Section { bytes, pattern });
        }
    }
    sections
}

/// Functions have sections of their own, but for the C library's, which are named by their file. Assembler code of crates
/// has neither, and stays where it is.
fn pattern(file: &str, name: &str) -> Option<String> {
    let base = file.rsplit('/').next().unwrap_or(file);
    let (archive, member) = base.strip_suffix(')').and_then(|base| base.split_once('(')).unwrap_or(("", base));
    if !name.starts_with(".text") || archive.ends_with(".rlib") && name == ".text" {
        return None;
    }
    Some(match archive {
        "" if name == ".text" => format!("*{member}({name})"),
        archive if archive.ends_with(".a") => format!("*{archive}:{member}({name})"),
        _ => format!("*({})", without_hashes(name)),
    })
}

/// Names say which build of a crate they are from: `17h` and 16 digits at the end of an older one, `Cs` and a number in a
/// newer one. That is no matter here.
fn without_hashes(name: &str) -> String {
    let name = name.replace('$', "?");
    let name = name.split_once(".llvm.").map_or(name.clone(), |(name, _)| format!("{name}.llvm.*"));
    if !name.contains("._R") {
        return match name.rsplit_once("17h").filter(|(_, after)| after.len() >= 17) {
            Some((before, after)) => format!("{before}17h????????????????{}", &after[16..]),
            None => name,
        };
    }
    let mut parts = name.split("Cs");
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric());
        match part.split_once('_').filter(|(number, _)| is_number(number)) {
            Some((_, rest)) => out.extend(["Cs*_", rest]),
            None => out.extend(["Cs", part]),
        }
    }
    out
}

/// What most commands run comes first, and what the same commands run lies together.
fn script_of(sections: &BTreeMap<u64, Section>, used: &BTreeMap<u64, u64>) -> String {
    let mut order: Vec<(&u64, &u64)> = used.iter().collect();
    order.sort_by_key(|(address, commands)| (std::cmp::Reverse(commands.count_ones()), **commands, **address));
    let mut script = String::from(
        "/* The code that usual commands of vireo-img run, side by side; `cargo xtask layout` writes this file. */\n\
         SECTIONS\n{\n  .text.usual :\n  {\n",
    );
    let mut seen = std::collections::HashSet::new();
    for section in order.iter().filter_map(|(address, _)| sections.get(address)) {
        if seen.insert(&section.pattern) {
            script.extend(["    ", &section.pattern, "\n"]);
        }
    }
    script.push_str("  }\n}\nINSERT BEFORE .text;\n");
    script
}

#[test]
fn sections_are_named_without_hashes() {
    for (file, name, want) in [
        ("/t/deps/img-0.rcgu.o", ".text._ZN3img3run17h0123456789abcdefE", "*(.text._ZN3img3run17h????????????????E)"),
        (
            "/t/img.o",
            ".text._ZN3i$u20$n17h0123456789abcdefE.llvm.77",
            "*(.text._ZN3i?u20?n17h????????????????E.llvm.*)",
        ),
        ("/r/libstd-1.rlib(std-1.o)", ".text.unlikely._RNvCs9a_3std3run", "*(.text.unlikely._RNvCs*_3std3run)"),
        ("/r/libzstd.rlib(z.o)", ".text.ZSTD_fast", "*(.text.ZSTD_fast)"),
        ("/r/libzstd.rlib(huf.o)", ".text", ""),
        ("/r/libc.a(fclose.o)", ".data", ""),
        ("/usr/lib/libc.a(fclose.o)", ".text", "*libc.a:fclose.o(.text)"),
        ("/usr/lib/rcrt1.o", ".text", "*rcrt1.o(.text)"),
    ] {
        assert_eq!(pattern(file, name).unwrap_or_default(), want);
    }
}

#[test]
fn a_map_and_a_trace_are_read() {
    let map = "             VMA              LMA     Size Align Out     In      Symbol\n\
               11b900 11b900 452 16 .text\n\
               11b900 11b900 26 1 /usr/lib/rcrt1.o:(.text)\n\
               11b926 11b926 0 1 /usr/lib/crti.o:(.text)\n\
               11b940 11b940 30 16 /t/a.o:(.text.f)\n\
               11b940 11b940 30 1                 f\n\
               2000 2000 30 16 /t/a.o:(.rodata)\n";
    let found: Vec<_> = sections(map).into_iter().map(|(at, section)| (at, section.bytes, section.pattern)).collect();
    assert_eq!(found, [(0x11b900, 0x26, "*rcrt1.o(.text)".to_owned()), (0x11b940, 0x30, "*(.text.f)".to_owned())]);
    let trace = "events: Ir\n\nob=/t/tool\nfn=main\n0x11b900 0 3\ncob=/lib/x\ncfn=f\ncalls=1 0x99 0\n0x11b904 0 7\nob=/lib/x\n0x99 0 1\n";
    assert_eq!(executed(trace, Path::new("/t/tool")), [0x11b900, 0x11b904]);
}

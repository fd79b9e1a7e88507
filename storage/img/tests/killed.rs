//! Commands that are killed before one of their writes: images they only read are untouched; an image they change has
//! no damage and shows what it showed before or what it shall show; and the same command then does its work.
//!
//! The kill comes from strace, at the N-th call that changes a file, for every N until the command gets to its end (for
//! some of them unless `VIREO_TEST_LONG` is set).

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output};

const CHANGES: &str =
    "pwrite64,pwritev,pwritev2,write,fallocate,ftruncate,copy_file_range,fdatasync,fsync,unlink,rename";

/// One command and what must hold of its files.
struct Case {
    /// Makes the files: words of qemu-img, or of qemu-io behind `io`.
    prepare: &'static [&'static str],
    command: &'static str,
    /// Files that it only reads.
    untouched: &'static [&'static str],
    /// The image it changes or makes, with its format; what it shows is what it showed before, or after a whole run.
    image: (&'static str, &'static str),
    /// Whether the image is a new one, which may be unfinished.
    is_new: bool,
    /// Whether the command can run again after one that has had its effect.
    again: bool,
}

const BASE: &str = "create -q -f raw base.raw 2M";
const FILL_BASE: &str = "io -f raw -c 'write -P 1 0 2M' base.raw";
const MID: &str = "create -q -f qcow2 -o cluster_size=4k -b base.raw -F raw mid.qcow2";
const FILL_MID: &str = "io -f qcow2 -c 'write -P 2 64k 512k' -c 'write -z 1M 64k' mid.qcow2";
const TOP: &str = "create -q -f qcow2 -o cluster_size=4k -b mid.qcow2 -F qcow2 top.qcow2";
const FILL_TOP: &str = "io -f qcow2 -c 'write -P 3 128k 128k' -c 'write -P 4 1900k 8k' top.qcow2";
const CHAIN: &[&str] = &[BASE, FILL_BASE, MID, FILL_MID, TOP, FILL_TOP];
const ALONE: &[&str] = &[
    "create -q -f qcow2 -o cluster_size=4k a.qcow2 2M",
    "io -f qcow2 -c 'write -P 5 0 256k' a.qcow2",
    "snapshot -c old a.qcow2",
    "io -f qcow2 -c 'write -P 6 128k 256k' a.qcow2",
    "bitmap --add --enable a.qcow2 b",
];

const fn changes(prepare: &'static [&'static str], command: &'static str, image: &'static str, again: bool) -> Case {
    Case { prepare, command, untouched: &[], image: (image, "qcow2"), is_new: false, again }
}

const fn makes(command: &'static str, image: &'static str, format: &'static str) -> Case {
    let untouched = &["base.raw", "mid.qcow2", "top.qcow2"];
    Case { prepare: CHAIN, command, untouched, image: (image, format), is_new: true, again: true }
}

const CASES: &[Case] = &[
    makes("create -q -f qcow2 -o preallocation=metadata new.qcow2 2M", "new.qcow2", "qcow2"),
    makes("create -q -f qcow2 -b mid.qcow2 -F qcow2 new.qcow2", "new.qcow2", "qcow2"),
    makes("convert -f qcow2 -O qcow2 top.qcow2 new.qcow2", "new.qcow2", "qcow2"),
    makes("convert -f qcow2 -O qcow2 -c -W top.qcow2 new.qcow2", "new.qcow2", "qcow2"),
    makes("convert -f qcow2 -O raw -S 0 top.qcow2 new.raw", "new.raw", "raw"),
    makes("convert -f qcow2 -O vmdk -o subformat=streamOptimized top.qcow2 new.vmdk", "new.vmdk", "vmdk"),
    makes("convert -f qcow2 -O vhdx top.qcow2 new.vhdx", "new.vhdx", "vhdx"),
    makes("convert -f qcow2 -O vdi top.qcow2 new.vdi", "new.vdi", "vdi"),
    makes("dd -f qcow2 -O raw bs=64k if=top.qcow2 of=new.raw", "new.raw", "raw"),
    Case { untouched: &["base.raw"], ..changes(CHAIN, "commit -q -f qcow2 top.qcow2", "top.qcow2", true) },
    Case { untouched: &["mid.qcow2"], ..changes(CHAIN, "commit -q -b base.raw -f qcow2 top.qcow2", "top.qcow2", true) },
    Case {
        untouched: &["base.raw", "mid.qcow2"],
        ..changes(CHAIN, "rebase -f qcow2 -b base.raw -F raw top.qcow2", "top.qcow2", true)
    },
    Case {
        untouched: &["base.raw", "mid.qcow2"],
        ..changes(CHAIN, "rebase -f qcow2 -b '' top.qcow2", "top.qcow2", true)
    },
    changes(ALONE, "snapshot -c new a.qcow2", "a.qcow2", true),
    changes(ALONE, "snapshot -a old a.qcow2", "a.qcow2", true),
    changes(ALONE, "snapshot -d old a.qcow2", "a.qcow2", false),
    changes(ALONE, "resize -q -f qcow2 a.qcow2 4M", "a.qcow2", true),
    changes(ALONE, "resize -q -f qcow2 --preallocation=full a.qcow2 3M", "a.qcow2", false),
    changes(ALONE, "amend -f qcow2 -o lazy_refcounts=on a.qcow2", "a.qcow2", true),
    changes(ALONE, "amend -f qcow2 -o refcount_bits=64 a.qcow2", "a.qcow2", true),
    changes(ALONE, "bitmap --remove a.qcow2 b", "a.qcow2", false),
    changes(ALONE, "bitmap --add a.qcow2 c", "a.qcow2", false),
];

fn words(line: &str) -> Vec<String> {
    let quoted = line.split('\'').enumerate();
    quoted
        .flat_map(|(index, part)| match index % 2 {
            0 => part.split_whitespace().map(str::to_owned).collect(),
            _ => vec![part.to_owned()],
        })
        .collect()
}

fn run(program: &str, dir: &Path, words: &[String]) -> Output {
    let out = Command::new(program).args(words).current_dir(dir).env("LC_ALL", "C").output();
    out.unwrap_or_else(|error| panic!("{program} does not start: {error}"))
}

fn prepare(case: &Case) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for line in case.prepare {
        let words = words(line);
        let out = match words[0].as_str() {
            "io" => run("qemu-io", dir.path(), &words[1..]),
            _ => run("qemu-img", dir.path(), &words),
        };
        assert!(out.status.success(), "{line}: {}", String::from_utf8_lossy(&out.stderr));
    }
    dir
}

/// What the image shows, with what is below it; `None` when it cannot be opened.
fn shown(dir: &Path, (name, format): (&str, &str)) -> Option<Vec<u8>> {
    let line = format!("convert -f {format} -O raw {name} shown.raw");
    let out = run("qemu-img", dir, &words(&line));
    out.status.success().then(|| std::fs::read(dir.join("shown.raw")).unwrap())
}

/// Runs the command, killed before its N-th change of a file; whether it was.
fn is_killed(case: &Case, dir: &Path, number: u32) -> bool {
    let inject = format!("inject={CHANGES}:signal=KILL:when={number}");
    let mut all = words(&format!("-f -qq -o /dev/null -e trace={CHANGES} -e {inject}"));
    all.push(env!("CARGO_BIN_EXE_vireo-img").to_owned());
    all.extend(words(case.command));
    let out = run("strace", dir, &all);
    match (out.status.signal(), out.status.code()) {
        (Some(9), _) => true,
        (_, Some(0)) => false,
        _ => panic!("{}: {:?} {}", case.command, out.status, String::from_utf8_lossy(&out.stderr)),
    }
}

fn copy_of(dir: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    copy
}

/// The files of a case and what its image shows.
struct Prepared<'a> {
    case: &'a Case,
    files: tempfile::TempDir,
    before: Option<Vec<u8>>,
    /// After a run that nobody disturbed.
    after: Option<Vec<u8>>,
}

impl Prepared<'_> {
    fn new(case: &Case) -> Prepared<'_> {
        let files = prepare(case);
        let before = if case.is_new { None } else { shown(files.path(), case.image) };
        let whole = copy_of(files.path());
        let run = run(env!("CARGO_BIN_EXE_vireo-img"), whole.path(), &words(case.command));
        assert!(run.status.success(), "{}: {}", case.command, String::from_utf8_lossy(&run.stderr));
        let after = shown(whole.path(), case.image);
        Prepared { case, files, before, after }
    }

    /// Kills the command once; whether it was killed before it got to its end.
    fn judge(&self, number: u32) -> bool {
        let (case, (name, format)) = (self.case, self.case.image);
        let dir = copy_of(self.files.path());
        let dir = dir.path();
        let killed = is_killed(case, dir, number);
        let what = format!("{}, killed before change {number}", case.command);
        for name in case.untouched {
            let [was, is] = [self.files.path(), dir].map(|dir| std::fs::read(dir.join(name)).unwrap());
            assert!(was == is, "{what}: {name} has changed");
        }
        if !case.is_new {
            let check = run("qemu-img", dir, &words(&format!("check -f {format} {name}")));
            let text = String::from_utf8_lossy(&check.stdout).into_owned();
            assert!(matches!(check.status.code(), Some(0 | 3)), "{what}: {text}");
            let now = shown(dir, case.image);
            assert!(now.is_some() && (now == self.before || now == self.after), "{what}: {name} shows something else");
        }
        if case.again {
            let again = run(env!("CARGO_BIN_EXE_vireo-img"), dir, &words(case.command));
            assert!(again.status.success(), "{what}, again: {}", String::from_utf8_lossy(&again.stderr));
            assert!(shown(dir, case.image) == self.after, "{what}: {name} shows something else in the end");
        }
        killed
    }
}

#[test]
fn nothing_is_lost_by_a_kill() {
    let all = std::env::var_os("VIREO_TEST_LONG").is_some();
    for case in CASES {
        let prepared = Prepared::new(case);
        let mut number = 1;
        while prepared.judge(number) {
            number += if all { 1 } else { 1 + number / 2 };
        }
        assert!(number > 1, "{}: no call was met", case.command);
    }
}

//! Disks of a domain through an unmodified virsh. Texts and numbers are what a stock libvirtd 9.0 with QEMU gives for the
//! same calls, but for the name that QEMU invents for the group of a disk that is in none.

use std::fs;
use std::io::Read;
use std::process::Stdio;

use crate::session::Session;
use crate::virsh::check;

/// Defines `vm1` with a disk `vda` that has `iotune`, and a plain `vdb`.
fn define(session: &Session, iotune: &str) -> String {
    let disks = session.raw_disk("vda.raw", "vda", iotune) + &session.raw_disk("vdb.raw", "vdb", "");
    let file = session.domain_file("vm1", "", &disks);
    session.virsh(&format!("define {file}"))
}

/// The fields that are not 0, a line each.
fn limits(session: &Session, line: &str) -> String {
    let said = session.virsh(&format!("blkdeviotune {line}"));
    let lines =
        said.lines().filter(|line| !line.ends_with(": 0") && !line.ends_with(" :") && !line.ends_with("name     :"));
    lines.map(|line| line.split_whitespace().collect::<String>()).collect::<Vec<_>>().join(" ")
}

const IO_TUNE: &str = "<iotune><write_bytes_sec>1000000</write_bytes_sec><read_bytes_sec>2000000</read_bytes_sec>\
    <write_bytes_sec_max>3000000</write_bytes_sec_max><write_bytes_sec_max_length>5</write_bytes_sec_max_length>\
    <size_iops_sec>4096</size_iops_sec><group_name>grp</group_name><total_iops_sec>100</total_iops_sec></iotune>";

#[test]
fn limits_are_shown_set_and_refused_as_libvirt_does() {
    let session = Session::start();
    assert_eq!(define(&session, IO_TUNE), "Domain 'vm1' defined from vm1.xml\n");
    check(
        &session,
        "
$ blkdeviotune vm1 vda
total_bytes_sec: 0
read_bytes_sec : 2000000
write_bytes_sec: 1000000
total_iops_sec : 100
read_iops_sec  : 0
write_iops_sec : 0
total_bytes_sec_max: 0
read_bytes_sec_max: 0
write_bytes_sec_max: 3000000
total_iops_sec_max: 0
read_iops_sec_max: 0
write_iops_sec_max: 0
size_iops_sec  : 4096
group_name     : grp
total_bytes_sec_max_length: 0
read_bytes_sec_max_length: 0
write_bytes_sec_max_length: 5
total_iops_sec_max_length: 0
read_iops_sec_max_length: 0
write_iops_sec_max_length: 0
$ blkdeviotune vm1 vda --live
error: Unable to get number of block I/O throttle parameters
error: Requested operation is not valid: domain is not running
$ blkdeviotune vm1 vdc
error: Unable to get block I/O throttle parameters
error: invalid argument: disk 'vdc' was not found in the domain config
$ blkdeviotune vm1 vdb --read-iops-sec 5 --total-iops-sec-max 9
$ blkdeviotune vm1 vdb --total-bytes-sec 1 --live
error: Unable to change block I/O throttle
error: Requested operation is not valid: domain is not running
$ start vm1
Domain 'vm1' started
",
    );
    let mut listener = session.virsh_command("libvirt-sock", "event vm1 tunable --loop");
    let mut listener = listener.stdout(Stdio::piped()).spawn().unwrap();
    check(
        &session,
        "
$ blkdeviotune vm1 vdc
error: Unable to get block I/O throttle parameters
error: invalid argument: disk 'vdc' not found in domain
$ blkdeviotune vm1 vdb --total-bytes-sec 5 --read-bytes-sec 5
error: Unable to change block I/O throttle
error: invalid argument: total and read/write of bytes_sec cannot be set at the same time
$ blkdeviotune vm1 vdb --total-iops-sec 5 --write-iops-sec 5
error: Unable to change block I/O throttle
error: invalid argument: total and read/write of iops_sec cannot be set at the same time
$ blkdeviotune vm1 vdb --total-bytes-sec-max 5 --write-bytes-sec-max 5
error: Unable to change block I/O throttle
error: invalid argument: total and read/write of bytes_sec_max cannot be set at the same time
$ blkdeviotune vm1 vdb --total-iops-sec-max 5 --write-iops-sec-max 5
error: Unable to change block I/O throttle
error: invalid argument: total and read/write of iops_sec_max cannot be set at the same time
$ blkdeviotune vm1 vdb --total-bytes-sec-max 5
error: Unable to change block I/O throttle
error: unsupported configuration: cannot reset 'total_bytes_sec' when 'total_bytes_sec_max' is set
$ blkdeviotune vm1 vdb --total-bytes-sec 2000000000000000
error: Unable to change block I/O throttle
error: argument unsupported: block I/O throttle limit value must be no more than 1000000000000000
$ blkdeviotune vm1 vdb --total-iops-sec 0 --total-iops-sec-max 0
$ blkdeviotune vm1 vdb --read-iops-sec 10 --read-iops-sec-max 5
error: Unable to change block I/O throttle
error: unsupported configuration: value 'read_iops_sec_max' cannot be smaller than 'read_iops_sec'
$ blkdeviotune vm1 vdb --read-iops-sec 10 --read-iops-sec-max 20
$ blkdeviotune vm1 vdb --read-bytes-sec 1000 --write-bytes-sec 2000
",
    );
    let shown =
        "read_bytes_sec:1000 write_bytes_sec:2000 read_iops_sec:10 read_iops_sec_max:20 read_iops_sec_max_length:1";
    assert_eq!(limits(&session, "vm1 vdb"), shown);
    assert_eq!(limits(&session, "vm1 vdb --config"), "read_iops_sec:5 total_iops_sec_max:9");
    let mut told = [0; 1024];
    let mut lines = String::new();
    while !lines.contains("write_bytes_sec: 2000") {
        let bytes = listener.stdout.as_mut().unwrap().read(&mut told).unwrap();
        assert!(bytes > 0, "{lines}");
        lines.push_str(&String::from_utf8_lossy(&told[..bytes]));
    }
    listener.kill().unwrap();
    listener.wait().unwrap();
    let event = "event 'tunable' for domain 'vm1':\n\tblkdeviotune.disk: vdb\n\tblkdeviotune.read_iops_sec: 10\n\t\
                 blkdeviotune.read_iops_sec_max: 20\n";
    assert!(lines.contains(event), "{lines}");
}

#[test]
fn disks_of_a_group_change_together_and_a_restarted_daemon_knows_it() {
    let mut session = Session::start();
    define(&session, "<iotune><read_bytes_sec>1000</read_bytes_sec><size_iops_sec>0</size_iops_sec></iotune>");
    session.virsh("start vm1");
    for line in ["vda --group-name g1", "vdb --group-name g1", "vdb --total-iops-sec 33", "vdb --write-bytes-sec 44"] {
        assert_eq!(session.virsh(&format!("blkdeviotune vm1 {line}")), "\n", "{line}");
    }
    session.kill_daemon();
    session.start_daemon();
    for disk in ["vda", "vdb"] {
        let shown = "write_bytes_sec:44 total_iops_sec:33 group_name:g1";
        assert_eq!(limits(&session, &format!("vm1 {disk}")), shown);
    }
    let document = session.virsh("dumpxml vm1");
    let iotune = "      <iotune>\n        <write_bytes_sec>44</write_bytes_sec>\n        \
                  <total_iops_sec>33</total_iops_sec>\n        <group_name>g1</group_name>\n      </iotune>\n";
    assert_eq!(document.matches(iotune).count(), 2, "{document}");
    assert!(session.virsh("dumpxml vm1 --inactive").contains("<read_bytes_sec>1000</read_bytes_sec>"));
    // Who takes back its last limit leaves the group, alone.
    session.virsh("blkdeviotune vm1 vdb --total-iops-sec 0 --total-bytes-sec 0");
    assert_eq!(limits(&session, "vm1 vdb"), "");
    assert!(limits(&session, "vm1 vda").contains("group_name:g1"));
    let log = fs::read_to_string(session.path("var/log/libvirt/qemu/vm1.log")).unwrap();
    let last = log.lines().rfind(|line| line.starts_with("throttle ")).unwrap();
    assert!(last.starts_with(r#"throttle vdb {"group":null,"bytes":{"total":{"rate":0,"#), "{last}");
    let joined = log.lines().find(|line| line.starts_with("throttle vdb")).unwrap();
    assert!(
        joined.contains(r#""group":"g1","bytes":{"total":{"rate":0,"burst_rate":0,"burst_s":0},"read":{"rate":1000"#)
    );
}

#[test]
fn documents_with_limits_that_cannot_be_are_refused_as_libvirt_does() {
    let session = Session::start();
    for (iotune, expected) in [
        (
            "<total_bytes_sec>5</total_bytes_sec><read_bytes_sec>5</read_bytes_sec>",
            "XML error: total and read/write bytes_sec cannot be set at the same time",
        ),
        (
            "<total_iops_sec_max>5</total_iops_sec_max><read_iops_sec_max>5</read_iops_sec_max>",
            "XML error: total and read/write iops_sec_max cannot be set at the same time",
        ),
        ("<total_bytes_sec>x</total_bytes_sec>", "XML error: disk iotune field 'total_bytes_sec' must be an integer"),
        ("<total_bytes_sec>-5</total_bytes_sec>", "XML error: disk iotune field 'total_bytes_sec' must be an integer"),
        (
            "<total_bytes_sec>2000000000000000</total_bytes_sec>",
            "argument unsupported: block I/O throttle limit must be no more than 1000000000000000 using QEMU",
        ),
        (
            "<group_name>g</group_name>",
            "unsupported configuration: group_name can be configured only together with settings",
        ),
    ] {
        let said = define(&session, &format!("<iotune>{iotune}</iotune>"));
        assert_eq!(said, format!("error: Failed to define domain from vm1.xml\nerror: {expected}\n"));
    }
    define(&session, "<iotune><total_bytes_sec>0</total_bytes_sec></iotune>");
    assert!(!session.virsh("dumpxml vm1").contains("iotune"));
}

#[test]
fn a_disk_is_resized_and_described_as_libvirt_does() {
    let session = Session::start();
    define(&session, "");
    check(
        &session,
        "
$ blockresize vm1 vda 2M
error: Failed to resize block device 'vda'
error: Requested operation is not valid: domain is not running
$ domblkinfo vm1 vdz
error: invalid argument: invalid path vdz not assigned to domain
$ domblkstat vm1 vda
error: Requested operation is not valid: domain is not running
$ domblkerror vm1
error: Requested operation is not valid: domain is not running
$ start vm1
Domain 'vm1' started
$ blockresize vm1 vdz 2M
error: Failed to resize block device 'vdz'
error: invalid argument: disk 'vdz' was not found in the domain config
$ blockresize vm1 vda 2048
Block device 'vda' is resized
$ blockresize vm1 vdb 1000001b
Block device 'vdb' is resized
$ blockresize vm1 vdb 0
Block device 'vdb' is resized
$ domblkstat vm1 vda --human
Device: vda
 number of read operations:      2
 number of bytes read:           4608
 number of write operations:     0
 number of bytes written:        0
 number of flush operations:     0
 total duration of reads (ns):   149766
 total duration of writes (ns):  0
 total duration of flushes (ns): 0
$ domblkstat vm1
 rd_req 4
 rd_bytes 9216
 wr_req 0
 wr_bytes 0
 flush_operations 0
 rd_total_times 299532
 wr_total_times 0
 flush_total_times 0
$ domblkinfo vm1 --all
 Target   Capacity   Allocation   Physical
--------------------------------------------
 vda      1048576    4096         8192
 vdb      1048576    4096         8192
$ destroy vm1
Domain 'vm1' destroyed
",
    );
    let log = fs::read_to_string(session.path("var/log/libvirt/qemu/vm1.log")).unwrap();
    let told: Vec<&str> = log.lines().filter(|line| line.starts_with("resize ")).collect();
    assert_eq!(told, ["resize vda 2097152", "resize vdb 1000001", "resize vdb 0"]);
    fs::remove_file(session.path("vdb.raw")).unwrap();
    let path = session.path("vdb.raw");
    let expected = format!("error: Failed to open file '{}': No such file or directory\n", path.display());
    assert_eq!(session.virsh("domblkinfo vm1 vdb"), expected);
}

/// What a definition whose disk has `driver` in its `<driver>` is answered, and how the element is written back.
fn driver(session: &Session, driver: &str) -> Result<String, String> {
    let disk = session.raw_disk("vda.raw", "vda", &format!("<driver name='qemu' type='raw' {driver}/>"));
    session.virsh("undefine vm1");
    let file = session.domain_file("vm1", "", &disk);
    let said = session.virsh(&format!("define {file}"));
    if let Some(error) = said.strip_prefix("error: Failed to define domain from vm1.xml\nerror: ") {
        return Err(error.trim_end().to_owned());
    }
    let document = session.virsh("dumpxml vm1");
    let line = document.lines().find_map(|line| line.trim().strip_prefix("<driver name='qemu' type='raw'"));
    Ok(line.unwrap().strip_suffix("/>").unwrap().trim().to_owned())
}

#[test]
fn every_attribute_of_a_disks_driver_is_kept_or_refused_as_libvirt_does() {
    let session = Session::start();
    let wrong = |attribute: &str, more: &str| {
        Err(format!("XML error: Invalid value for attribute '{attribute}' in element 'driver': 'x'.{more}"))
    };
    let number = " Expected non-negative integer value";
    let kept = |attributes: &str| Ok(attributes.to_owned());
    let refused = |text: &str| Err(format!("unsupported configuration: {text}"));
    for (attributes, expected) in [
        ("cache='x'", wrong("cache", "")),
        ("cache='default'", kept("")),
        ("cache='writethrough'", kept("cache='writethrough'")),
        ("io='native' cache='none'", kept("cache='none' io='native'")),
        ("cache='directsync' io='threads'", kept("cache='directsync' io='threads'")),
        (
            "cache='writethrough' io='native'",
            refused("io='native' needs either no disk cache or directsync cache mode"),
        ),
        ("io='x'", wrong("io", "")),
        ("discard='x'", wrong("discard", "")),
        ("detect_zeroes='x'", wrong("detect_zeroes", "")),
        ("detect_zeroes='unmap' discard='unmap'", kept("discard='unmap' detect_zeroes='unmap'")),
        ("error_policy='x'", wrong("error_policy", "")),
        ("rerror_policy='x'", wrong("rerror_policy", "")),
        ("error_policy='enospace' rerror_policy='enospace'", refused("Invalid disk read error policy: 'enospace'")),
        ("rerror_policy='ignore' error_policy='ignore'", kept("error_policy='ignore' rerror_policy='ignore'")),
        ("queues='0'", kept("")),
        ("queues='x'", wrong("queues", number)),
        ("queue_size='1024' queues='4'", kept("queues='4' queue_size='1024'")),
        ("iothread='x'", wrong("iothread", number)),
        (
            "iothread='0'",
            Err("XML error: Invalid value for attribute 'iothread' in element 'driver': Zero is not permitted".into()),
        ),
        ("iothread='1'", refused("Disk iothread '1' not defined in iothreadid")),
    ] {
        assert_eq!(driver(&session, attributes), expected, "{attributes}");
    }
    for (attributes, expected) in [
        ("copy_on_read='on'", "copy_on_read 'on' is not supported: remove the attribute from <driver>"),
        ("queues='17'", "number of disk queues '17' is not supported: at most 16"),
        ("queue_size='100'", "disk queue_size '100' is not supported: it must be a power of 2, at most 1024"),
        ("queue_size='2048'", "disk queue_size '2048' is not supported: it must be a power of 2, at most 1024"),
    ] {
        assert_eq!(driver(&session, attributes), refused(expected), "{attributes}");
    }
}

#[test]
fn io_says_who_waits_for_a_disk() {
    let session = Session::start();
    for (attributes, given) in [
        ("", "vda Writeback Auto"),
        ("io='threads'", "vda Writeback Threads"),
        ("io='io_uring'", "vda Writeback Ring"),
        ("cache='none' io='native'", "vda None Ring"),
    ] {
        assert!(driver(&session, attributes).is_ok());
        let document = session.virsh("dumpxml vm1").replace("</kernel>", "</kernel><cmdline>show=disks</cmdline>");
        let file = session.path("shown.xml");
        fs::write(&file, document).unwrap();
        session.virsh(&format!("define {}", file.display()));
        let said = session.virsh("start vm1");
        assert!(said.trim_end().ends_with(given), "{attributes}: {said}");
    }
}

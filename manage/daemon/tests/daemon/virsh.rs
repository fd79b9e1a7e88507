//! An unmodified virsh against the daemon. The expected texts are what it prints against stock libvirtd; the releases
//! of Debian 12 (9.0) and of its backports (11.3) agree on all of them.

use std::fs;
use std::io::Read;
use std::process::{Command, Stdio};

use crate::session::{Session, shown};

/// Runs `script`: lines `$ COMMAND` for virsh, each followed by what it has to print.
pub fn check(session: &Session, script: &str) {
    let mut lines = script.lines().map(str::trim_end).filter(|line| !line.is_empty()).peekable();
    while let Some(line) = lines.next() {
        let command = line.strip_prefix("$ ").unwrap_or_else(|| panic!("no command in '{line}'"));
        let mut expected = String::new();
        while let Some(line) = lines.next_if(|line| !line.starts_with("$ ")) {
            expected.push_str(line);
            expected.push('\n');
        }
        let said = session.virsh(command);
        let said = if said == "\n" { String::new() } else { said };
        assert_eq!(said, expected, "virsh {command}\n{}", session.log());
    }
}

#[test]
fn an_empty_host_lists_nothing() {
    let session = Session::start();
    check(
        &session,
        "
$ list --all
 Id   Name   State
--------------------
$ list --name
$ dominfo nosuch
error: failed to get domain 'nosuch'
$ net-list --all
 Name   State   Autostart   Persistent
----------------------------------------
$ pool-list --all
 Name   State   Autostart
---------------------------
$ secret-list
 UUID   Usage
---------------
$ nwfilter-list
 UUID   Name
--------------
$ iface-list --all
 Name   State   MAC Address
-----------------------------
$ nodedev-list
$ net-info default
error: failed to get network 'default'
error: this function is not supported by the connection driver: virNetworkLookupByName
$ maxvcpus
1
$ sysinfo
error: failed to get sysinfo
error: unsupported configuration: Host SMBIOS information is not available
",
    );
    assert!(session.virsh("version").ends_with("Running hypervisor: QEMU 10.0.2\n"));
    assert!(session.virsh("capabilities").contains("<domain type='qemu'/>"));
    assert!(session.virsh("domcapabilities").contains("<machine>vireo-q35-1</machine>"));
    let wrong = session.virsh_command("libvirt-sock", "list").args(["-c", "qemu:///nosuch"]).output().unwrap();
    assert!(!wrong.status.success());
}

/// A disk and a document that has it.
fn disk_domain(session: &Session, name: &str, cmdline: &str) {
    let file = session.domain_file(name, cmdline, &session.raw_disk("disk.raw", "vda", ""));
    assert_eq!(session.virsh(&format!("define {file}")), format!("Domain '{name}' defined from {file}\n"));
}

#[test]
fn a_domains_life_is_told_as_libvirt_tells_it() {
    let session = Session::start();
    session.define("vm1", "");
    check(
        &session,
        "
$ list --all
 Id   Name   State
-----------------------
 -    vm1    shut off
$ domstate vm1 --reason
shut off (unknown)
$ domid vm1
-
$ destroy vm1
error: Failed to destroy domain 'vm1'
error: Requested operation is not valid: domain is not running
$ shutdown vm1
error: Failed to shutdown domain 'vm1'
error: Requested operation is not valid: domain is not running
$ suspend vm1
error: Failed to suspend domain 'vm1'
error: Requested operation is not valid: domain is not running
$ resume vm1
error: Failed to resume domain 'vm1'
error: Requested operation is not valid: domain is not running
$ reset vm1
error: Failed to reset domain 'vm1'
error: Requested operation is not valid: domain is not running
$ console vm1
error: The domain is not running
$ start vm1
Domain 'vm1' started
$ start vm1
error: Domain is already active
$ list --all
 Id   Name   State
----------------------
 1    vm1    running
$ domstate vm1 --reason
running (booted)
$ domid vm1
1
$ console vm1
error: Cannot run interactive console without a controlling TTY
$ vcpucount vm1
maximum      config         1
maximum      live           1
current      config         1
current      live           1
$ domcontrol vm1
ok
$ domjobinfo vm1
Job type:         None
$ domtime vm1
error: argument unsupported: QEMU guest agent is not configured
$ shutdown vm1 --mode agent
error: Failed to shutdown domain 'vm1'
error: argument unsupported: QEMU guest agent is not configured
$ save vm1 /nowhere
error: Failed to save domain 'vm1' to /nowhere
error: this function is not supported by the connection driver: virDomainSave
$ suspend vm1
Domain 'vm1' suspended
$ suspend vm1
Domain 'vm1' suspended
$ domstate vm1 --reason
paused (user)
$ resume vm1
Domain 'vm1' resumed
$ resume vm1
error: Failed to resume domain 'vm1'
error: Requested operation is not valid: domain is already running
$ domstate vm1 --reason
running (unpaused)
$ reset vm1
Domain 'vm1' was reset
$ inject-nmi vm1
$ shutdown vm1
Domain 'vm1' is being shutdown
",
    );
    session.wait_for("domstate vm1 --reason", "shut off (shutdown)");
    check(
        &session,
        "
$ start vm1 --paused
Domain 'vm1' started
$ domstate vm1 --reason
paused (user)
$ undefine vm1
Domain 'vm1' has been undefined
$ list --transient
 Id   Name   State
---------------------
 2    vm1    paused
$ dominfo vm1 --nosuch
error: command 'dominfo' doesn't support option --nosuch
$ destroy vm1
Domain 'vm1' destroyed
$ list --all
 Id   Name   State
--------------------
",
    );
}

#[test]
fn a_reboot_keeps_the_domain_and_its_id() {
    let session = Session::start();
    session.define("vm1", "");
    assert_eq!(session.virsh("start vm1"), "Domain 'vm1' started\n");
    let before = session.guest_pid("vm1");
    let mut events = session
        .virsh_command("libvirt-sock", "event --event reboot --timeout 60")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Whether virsh listens already cannot be seen from outside, so the guest is rebooted until it has heard of it.
    while events.try_wait().unwrap().is_none() {
        assert_eq!(session.virsh("reboot vm1"), "Domain 'vm1' is being rebooted\n");
    }
    let mut said = String::new();
    events.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(said.starts_with("event 'reboot' for domain 'vm1'\n"), "{said}");
    session.wait_for("domstate vm1 --reason", "running (booted)");
    assert_ne!(session.guest_pid("vm1"), before);
    assert_eq!(session.virsh("domid vm1"), "1\n");
    assert_eq!(session.virsh("domstate vm1 --reason"), "running (booted)\n");
}

#[test]
fn transient_domains_come_and_go() {
    let session = Session::start();
    session.domain_file("vm2", "", "");
    check(
        &session,
        "
$ create vm2.xml
Domain 'vm2' created from vm2.xml
$ list
 Id   Name   State
----------------------
 1    vm2    running
$ autostart vm2
error: Failed to mark domain 'vm2' as autostarted
error: Requested operation is not valid: cannot set autostart for transient domain
$ undefine vm2
error: Failed to undefine domain 'vm2'
error: Requested operation is not valid: cannot undefine transient domain
$ setmem vm2 32M --config
error: Requested operation is not valid: transient domains do not have any persistent config
$ destroy vm2
Domain 'vm2' destroyed
$ list --all
 Id   Name   State
--------------------
$ create vm2.xml --paused
Domain 'vm2' created from vm2.xml
$ domstate vm2 --reason
paused (user)
",
    );
    let taken = session.virsh("create vm2.xml");
    assert!(taken.contains("error: operation failed: domain 'vm2' already exists with uuid "), "{taken}");
}

#[test]
fn definitions_are_changed_renamed_and_annotated() {
    let session = Session::start();
    session.define("vm1", "");
    session.define("vm2", "");
    check(
        &session,
        "
$ autostart vm1
Domain 'vm1' marked as autostarted
$ list --all --autostart
 Id   Name   State
-----------------------
 -    vm1    shut off
$ list --all --no-autostart --name
vm2
$ domrename vm2 vm1
error: Requested operation is not valid: domain with name 'vm1' already exists
$ domrename vm2 vm3
Domain successfully renamed
$ undefine vm3
Domain 'vm3' has been undefined
$ undefine vm3
error: failed to get domain 'vm3'
$ setmaxmem vm1 256M --config
$ setmem vm1 128M --config
$ setmem vm1 500M --config
error: invalid argument: cannot set memory higher than max memory (512000 KiB > 262144 KiB)
$ setvcpus vm1 2 --config --maximum
$ setvcpus vm1 3 --config
error: invalid argument: requested vcpus is greater than max allowable vcpus for the persistent domain: 3 > 2
$ desc vm1 --title \"a title\" --config
Domain title updated successfully
$ list --all --title
 Id   Name   State      Title
---------------------------------
 -    vm1    shut off   a title
$ metadata vm1 --uri http://x.example/1 --key k --set '<a>1</a>' --config
Metadata modified
$ metadata vm1 --uri http://x.example/1
<a>1</a>
$ set-lifecycle-action vm1 poweroff preserve --config
$ dumpxml vm1 --xpath //on_poweroff
<on_poweroff>preserve</on_poweroff>
$ domxml-to-native qemu-argv --domain vm1
error: this function is not supported by the connection driver: virConnectDomainXMLToNative
",
    );
    let link = session.path("etc/libvirt/qemu/autostart/vm1.xml");
    assert_eq!(fs::read_link(link).unwrap(), session.path("etc/libvirt/qemu/vm1.xml"));
    let edit = |editor: &str| {
        shown(&session.virsh_command("libvirt-sock", "edit vm1").env("EDITOR", editor).output().unwrap())
    };
    assert_eq!(edit("sed -i s/262144/163840/g"), "Domain 'vm1' XML configuration edited.\n");
    assert_eq!(edit("true"), "Domain 'vm1' XML configuration not changed.\n");
    assert!(session.virsh("dominfo vm1").contains("Max memory:     163840 KiB\n"));
    // What virsh shows can be defined again and shows the same.
    let before = session.virsh("dumpxml vm1");
    fs::write(session.path("again.xml"), &before).unwrap();
    assert_eq!(session.virsh("define again.xml"), "Domain 'vm1' defined from again.xml\n");
    assert_eq!(session.virsh("dumpxml vm1"), before);
}

#[test]
fn disks_and_their_counters() {
    let session = Session::start();
    disk_domain(&session, "vm1", "");
    let source = session.path("disk.raw").display().to_string();
    check(
        &session,
        "
$ domblkinfo vm1 nosuch
error: invalid argument: invalid path nosuch not assigned to domain
$ start vm1
Domain 'vm1' started
$ domblkinfo vm1 vda
Capacity:       1048576
Allocation:     4096
Physical:       8192
$ domblkstat vm1 vda
vda rd_req 2
vda rd_bytes 4608
vda wr_req 0
vda wr_bytes 0
vda flush_operations 0
vda rd_total_times 149766
vda wr_total_times 0
vda flush_total_times 0
$ domblkerror vm1
No errors found
$ domiflist vm1
 Interface   Type   Source   Model   MAC
------------------------------------------
$ domifstat vm1 x
error: Failed to get interface stats vm1 x
error: invalid argument: invalid path, 'x' is not a known interface
",
    );
    let list = session.virsh("domblklist vm1 --details");
    assert!(list.contains(" file   disk     vda      ") && list.contains(&source), "{list}");
    let stats = session.virsh("domstats vm1");
    for expected in
        ["Domain: 'vm1'", "state.state=1", "vcpu.0.time=2800000000", "block.0.name=vda", "block.0.rd.bytes=4608"]
    {
        assert!(stats.contains(expected), "{expected}: {stats}");
    }
    assert!(session.virsh("vcpuinfo vm1").contains("State:          running\nCPU time:       2.8s\n"));
}

#[test]
fn wrong_documents_are_refused_in_libvirts_words() {
    let session = Session::start();
    let source = session.path("disk.raw").display().to_string();
    let kernel = session.path("kernel").display().to_string();
    let domain = |devices: &str| {
        format!(
            "<domain type='qemu'><name>bad</name><memory>65536</memory><os><type>hvm</type><kernel>{kernel}</kernel></os>\
             <devices>{devices}</devices></domain>"
        )
    };
    let check = |verb: &str, document: &str, expected: &str| {
        fs::write(session.path("bad.xml"), document).unwrap();
        let said = session.virsh(&format!("{verb} bad.xml"));
        assert!(said.contains(&format!("error: {expected}")), "{document}: {said}");
    };
    for (document, expected) in [
        ("<domain type='qemu'>\n", "(domain_definition):2: Premature end of data in tag domain line 1"),
        ("<foo/>", "XML error: expecting root element of 'domain', not 'foo'"),
        ("<domain type='qemu'><memory>1</memory></domain>", "missing name information"),
        ("<domain type='bogus'><name>x</name></domain>", "unsupported configuration: invalid domain type bogus"),
        (
            "<domain type='qemu'><name>x</name><os><type>hvm</type></os></domain>",
            "XML error: Memory size must be specified",
        ),
        (&domain("<hostdev mode='subsystem' type='pci'/>"), "unsupported configuration: <hostdev> is not supported"),
        (
            &domain("<disk><source file='/x'/><target dev='sda' bus='sata'/></disk>"),
            "unsupported configuration: disk bus 'sata'",
        ),
        (&domain("<disk><source file='/x'/></disk>"), "missing target information for device /x"),
    ] {
        check("define", document, expected);
    }
    assert_eq!(session.virsh("list --all --name"), "\n");
    let disk = |path: &str| domain(&format!("<disk><source file='{path}'/><target dev='vda'/></disk>"));
    check("create", &disk(&source), "Cannot access storage file ");
    check("create", &disk(&session.path("run").display().to_string()), "Cannot access storage file ");
    fs::write(session.path("garbage"), "no image").unwrap();
    let qcow2 = format!(
        "<disk><driver type='qcow2'/><source file='{}'/><target dev='vda'/></disk>",
        session.path("garbage").display()
    );
    check("create", &domain(&qcow2), "internal error: ");
    check(
        "create",
        &domain("<interface type='network'><source network='default'/></interface>"),
        "Network not found: ",
    );
    check(
        "create",
        &domain("").replace("'qemu'", "'kvm'"),
        "unsupported configuration: domain type 'kvm' does not work",
    );
    check(
        "create",
        &domain("").replace(&kernel, "/nowhere/vmlinuz"),
        "unable to open kernel '/nowhere/vmlinuz': No such file or directory",
    );
    assert_eq!(session.virsh("list --all --name"), "\n");
}

#[test]
fn a_read_only_connection_changes_nothing() {
    let session = Session::start();
    session.define("vm1", "");
    let refused = |line: &str, api: &str| {
        let expected = format!("error: operation forbidden: read only access prevents {api}\n");
        let said = session.virsh_on("libvirt-sock-ro", line);
        assert!(said.ends_with(&expected), "{line}: {said}");
        // The other socket, and a client that asks for no more itself.
        let mut command = Command::new("virsh");
        command.args(["-r", "-c", &session.uri_of("libvirt-sock"), line]).current_dir(session.path(""));
        let said = shown(&command.output().unwrap());
        assert!(said.ends_with(&expected), "{line}: {said}");
    };
    refused("start vm1", "virDomainCreate");
    refused("define vm1.xml", "virDomainDefineXML");
    assert_eq!(session.virsh_on("libvirt-sock-ro", "domstate vm1"), "shut off\n");
    let secure = session.virsh_on("libvirt-sock-ro", "dumpxml vm1 --security-info");
    assert!(secure.ends_with("error: operation forbidden: virDomainGetXMLDesc with secure flag\n"), "{secure}");
}

//! Consoles: a pseudo terminal, a log, and virsh in between.

use std::fs;

use e2e::host::{Domain, Host};
use e2e::screen::Screen;

/// The terminal of the only serial port, as a document has it.
fn source_path(document: &str) -> Option<&str> {
    let (_, rest) = document.split_once("<serial type='pty'>")?;
    let (_, rest) = rest.split_once("<source path='")?;
    rest.split_once('\'').map(|(path, _)| path)
}

#[test]
fn a_path_given_for_a_terminal_is_that_of_a_former_run() {
    let host = Host::start();
    // As libvirt has it: what stands there in a definition is left from a run, and the next one brings its own.
    let devices = "<serial type='pty'><source path='/dev/pts/4711'/><target port='0'/></serial>\
                   <console type='pty' tty='/dev/pts/4711'><source path='/dev/pts/4711'/><target type='serial'/></console>";
    host.define(&Domain { devices, ..Domain::named("vm1") });
    assert!(!host.virsh("dumpxml vm1").contains("/dev/pts/"));
    host.virsh("start vm1");
    let document = host.virsh("dumpxml vm1");
    let path = source_path(&document).unwrap_or_else(|| panic!("no terminal in\n{document}"));
    assert_ne!(path, "/dev/pts/4711");
    assert!(document.contains(&format!("<console type='pty' tty='{path}'>")), "{document}");
    assert_eq!(host.virsh("ttyconsole vm1"), format!("{path}\n"));
    // Whoever opens the path has the guest on the other side.
    let mut screen = Screen::run(host.virsh_command("console vm1"));
    screen.wait_for("up");
    screen.ask("hello", "HELLO");
    assert!(screen.leave().success());
    // The document of a run defines the domain again.
    fs::write(host.path("live.xml"), document).unwrap();
    host.virsh("destroy vm1");
    assert_eq!(host.virsh("define live.xml"), "Domain 'vm1' defined from live.xml\n");
    assert_eq!(host.virsh("start vm1"), "Domain 'vm1' started\n");
}

#[test]
fn the_console_log_is_begun_anew_or_continued_as_the_document_says() {
    let host = Host::start();
    for (name, append, twice) in
        [("anew", "", "up\n"), ("off", " append='off'", "up\n"), ("on", " append='on'", "up\nup\n")]
    {
        let log = host.console_log(name);
        let devices = format!("<serial type='pty'><log file='{}'{append}/></serial>", log.display());
        host.define(&Domain { devices: &devices, ..Domain::named(name) });
        host.virsh(&format!("start {name}"));
        host.wait_printed(name, "up\n");
        host.virsh(&format!("destroy {name}"));
        assert_eq!(fs::read_to_string(&log).unwrap(), "up\n");
        assert_eq!(host.virsh(&format!("start {name}")), format!("Domain '{name}' started\n"));
        let mut screen = Screen::run(host.virsh_command(&format!("console {name}")));
        screen.ask("seen", "SEEN");
        assert!(screen.leave().success());
        // What is typed is not output; what the guest answers is.
        host.wait_printed(name, "SEEN\n");
        let logged = fs::read_to_string(&log).unwrap();
        assert!(logged.starts_with(&format!("{twice}SEEN\n")), "{name}: {logged:?}");
    }
}

#[test]
fn a_start_with_its_console_shows_the_first_byte_and_the_last() {
    let host = Host::start();
    host.define(&Domain::named("vm1"));
    let mut screen = Screen::run(host.virsh_command("start vm1 --console"));
    screen.wait_for("Escape character is ^]");
    screen.wait_for("up");
    screen.ask("hello", "HELLO");
    assert_eq!(host.virsh("shutdown vm1"), "Domain 'vm1' is being shutdown\n");
    screen.wait_for("bye");
    assert!(screen.end().success());
    host.wait_for("domstate vm1 --reason", "shut off (shutdown)\n");
}

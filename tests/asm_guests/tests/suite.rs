//! The suite on the software CPU under both clocks, and on QEMU where it is installed.
#![forbid(unsafe_code)]

use asm_guests::engine::{self, Way};
use asm_guests::{Guest, Ran, Verdict, qemu};
use hv_core::Clock;
use hv_soft::SoftAccel;

fn check_all(run: impl Fn(&Guest) -> Verdict) {
    let failures: Vec<String> = asm_guests::all()
        .iter()
        .filter_map(|guest| match run(guest) {
            failed @ Verdict::Failed { .. } => Some(format!("{} ({}): {failed}", guest.name, guest.proves)),
            Verdict::Skipped(why) => {
                eprintln!("{} skipped: {why}", guest.name);
                None
            }
            _ => None,
        })
        .collect();
    assert!(failures.is_empty(), "{} guests failed:\n{}", failures.len(), failures.join("\n"));
}

fn on_soft(guest: &Guest, clock: Clock, way: Way) -> Verdict {
    engine::check(guest, &SoftAccel::default(), Ran::Soft, clock, way)
        .unwrap_or_else(|e| panic!("{}: {e:?}", guest.name))
}

#[test]
fn every_guest_does_what_the_manual_says_on_the_software_cpu() {
    check_all(|guest| on_soft(guest, Clock::host(), Way::Straight));
}

#[test]
fn every_guest_does_the_same_under_the_virtual_clock() {
    check_all(|guest| on_soft(guest, Clock::virtual_clock(), Way::Straight));
}

#[test]
fn no_guest_notices_that_its_machine_is_replaced() {
    check_all(|guest| on_soft(guest, Clock::host(), Way::Restored));
}

#[test]
fn qemu_agrees_or_differs_for_a_reason() {
    if !qemu::installed() {
        eprintln!("skipped: {} is not installed", qemu::PROGRAM);
        return;
    }
    check_all(|guest| qemu::check(guest).unwrap_or_else(|e| panic!("{}: {e:?}", guest.name)));
}

#[test]
fn there_are_at_least_thirty_guests_and_no_two_share_a_name() {
    let mut names: Vec<&str> = asm_guests::all().iter().map(|g| g.name).collect();
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count);
    assert!(count >= 30, "{count} guests");
}

//! Commit and rebase, as callers of qemu-img have them.

mod support;

use support::{FILLED, check};

#[test]
fn rebase_is_called_by_libvirt_and_cinder() {
    check(
        "
        peer create -q -f qcow2 base.qcow2 10M
        peer create -q -f qcow2 other.qcow2 10M
        peer create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2
        peer create -q raw.img 1M
        run rebase -u -F qcow2 -f qcow2 -b other.qcow2 top.qcow2
        same top.qcow2
        run rebase -u -b nowhere.qcow2 -F qcow2 top.qcow2
        ok info top.qcow2
        run rebase -u -b '' top.qcow2
        same top.qcow2
        run rebase -u -b base.qcow2 -F qcow2 top.qcow2
        same top.qcow2
        fail 1 rebase -u -b base.qcow2 top.qcow2
        fail 1 rebase -u -b base.qcow2 -F qcow2 raw.img
        fail 1 rebase -u -b base.qcow2 -F qcow2 nope
        usage rebase top.qcow2
        ",
    );
}

#[test]
fn commit_is_called_by_cinder_and_proxmox() {
    check(&format!(
        "{FILLED}
        peer create -q -f qcow2 -b top.qcow2 -F qcow2 third.qcow2 12M
        io -c 'write -P 7 2M 200k' -c 'write -z 512k 64k' -c 'write -P 8 11M 64k' third.qcow2
        peer create -q -f qcow2 -b raw.img -F raw over.qcow2
        io -c 'write -P 9 0 1M' -c 'write -z 1M 64k' over.qcow2
        # a layer that is shorter than those above and below it
        peer create -q -f raw long.img 1M
        io -f raw -c 'write -P 7 0 1M' long.img
        peer create -q -f qcow2 -b long.img -F raw short.qcow2 512k
        peer create -q -f qcow2 -b short.qcow2 -F qcow2 longer.qcow2 1M
        ok commit -q -b long.img longer.qcow2
        same long.img
        run commit -d third.qcow2
        same third.qcow2
        same top.qcow2
        run commit third.qcow2
        same third.qcow2
        ok commit -q -p -b base.qcow2 third.qcow2
        same base.qcow2
        ok commit -p top.qcow2
        same base.qcow2
        same top.qcow2
        run commit -f qcow2 over.qcow2
        same over.qcow2
        same raw.img
        fail 1 commit base.qcow2
        fail 1 commit -b nope third.qcow2
        fail 1 commit -b third.qcow2 third.qcow2
        fail 1 commit nope
        fail 1 commit -t foo third.qcow2
        fail 1 commit -r abc third.qcow2
        usage commit
        "
    ));
}

#[test]
fn rebase_copies_what_the_new_file_does_not_hold() {
    check(&format!(
        "{FILLED}
        peer create -q -f qcow2 -b top.qcow2 -F qcow2 third.qcow2 12M
        io -c 'write -P 7 2M 200k' -c 'write -z 512k 64k' third.qcow2
        copy third.qcow2 fourth.qcow2
        copy third.qcow2 fifth.qcow2
        peer create -q -f qcow2 alone.qcow2 6M
        io -c 'write -P 7 2M 200k' alone.qcow2
        peer create -q -f qcow2 -o compat=0.10,cluster_size=4k -b base.qcow2 -F qcow2 old.qcow2
        # nova, Proxmox
        run rebase -b base.qcow2 -F qcow2 -f qcow2 third.qcow2
        same third.qcow2
        run rebase -b '' third.qcow2
        same third.qcow2
        run rebase -b raw.img -F raw fourth.qcow2
        same fourth.qcow2
        ok rebase -p -c -b '' fifth.qcow2
        same fifth.qcow2
        run rebase -b base.qcow2 -F qcow2 alone.qcow2
        same alone.qcow2
        run rebase -b raw.img -F raw old.qcow2
        same old.qcow2
        fail 1 rebase -b nope -F qcow2 top.qcow2
        fail 1 rebase -b base.qcow2 top.qcow2
        fail 1 rebase -b base.qcow2 -F foo top.qcow2
        fail 1 rebase -b top.qcow2 -F qcow2 top.qcow2
        fail 1 rebase -b base.qcow2 -F qcow2 raw.img
        same top.qcow2
        "
    ));
}

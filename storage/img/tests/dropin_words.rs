//! Callers of qemu-img do not notice, in the corners of its commands: words and values that few use, and what is said of
//! wrong ones.

mod support;

use support::check;

#[test]
fn rebase_looks_at_the_new_format_and_locks_the_image() {
    check(
        "
        peer create -q -f qcow2 a 1M
        peer create -q -f qcow2 b 2M
        peer create -q -f raw raw.img 1M
        fail 1 rebase -u -b a -F nosuch b
        fail 1 rebase -u -b '' -F nosuch b
        fail 1 rebase -u -F nosuch b
        fail 1 rebase -b a -F nosuch b
        fail 1 rebase -u -b a -F nosuch -f raw raw.img
        same b
        run rebase -u -U -b a -F qcow2 b
        same b
        run rebase -U -b '' b
        same b
        ",
    );
}

#[test]
fn sources_put_together_have_no_backing_file() {
    check(
        "
        peer create -q -f qcow2 a 1M
        peer create -q -f qcow2 b 2M
        peer create -q -f qcow2 there 4M
        fail 1 convert -O qcow2 -B a -F qcow2 a b o
        fail 1 convert -O qcow2 -B a a b o
        fail 1 convert -O qcow2 -o backing_file=a,backing_fmt=qcow2 a b o
        fail 1 convert -O raw -B a -F qcow2 a b o
        fail 1 convert -n -O qcow2 -B a -F qcow2 a b there
        run convert -O qcow2 -B a -F qcow2 b o
        same o
        same there
        ",
    );
}

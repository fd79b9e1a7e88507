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

#[test]
fn a_size_may_be_negative_behind_the_file_name() {
    check(
        "
        peer create -q -f raw raw.img 4M
        peer create -q -f qcow2 a.qcow2 4M
        run resize -f raw raw.img -1M --shrink
        same raw.img
        run resize --shrink a.qcow2 -1M -q
        same a.qcow2
        run resize --shrink -- a.qcow2 -1M
        same a.qcow2
        run resize a.qcow2 -1k --shrink -f qcow2
        same a.qcow2
        fail 1 resize a.qcow2 -1M
        fail 1 resize --shrink a.qcow2 -1
        fail 1 resize 5M a.qcow2
        usage resize --shrink -1M a.qcow2
        usage resize -1M --shrink a.qcow2
        usage resize a.qcow2 --shrink -1M
        usage resize a.qcow2 -1M -1M
        usage resize a.qcow2 -- -1M --shrink
        usage resize a.qcow2 -1M -- --shrink
        usage resize a.qcow2 1M 2M
        usage resize a.qcow2 1M -f
        usage resize a.qcow2 -xM
        usage resize
        same a.qcow2
        ",
    );
}

#[test]
fn a_snapshot_is_named_by_its_id_and_its_name() {
    let mut script = "
        peer create -q -f qcow2 disk.qcow2 4M
        io -c 'write -P 1 0 64k' disk.qcow2
        peer snapshot -c one disk.qcow2
        io -c 'write -P 2 64k 64k' disk.qcow2
        # the second one has the first one's id for a name
        peer snapshot -c 1 disk.qcow2
        io -c 'write -P 3 0 1M' disk.qcow2
    "
    .to_owned();
    let there = ["snapshot.id=1,snapshot.name=one", "snapshot.name=1", "snapshot.id=2", "1", "one"];
    for params in there.into_iter().chain(["snapshot.name=x,snapshot.name=one"]) {
        script += &format!(
            "run convert -O raw -l {params} disk.qcow2 out.raw\nsame out.raw\nrun measure -O qcow2 -l {params} disk.qcow2\n"
        );
    }
    for params in [
        "snapshot.id=1,snapshot.name=1",
        "snapshot.id=,snapshot.name=one",
        "snapshot.id=3",
        "snapshot.id=one",
        "snapshot.foo=1",
        "snapshot.id=1,snapshot.foo=1",
        "snapshot.id=1,foo",
        "snapshot.id",
        "snapshot.",
        "snapshot",
        "foo=1",
    ] {
        script += &format!("fail 1 convert -l {params} disk.qcow2 no\nfail 1 measure -O raw -l {params} disk.qcow2\n");
    }
    check(&script);
}

#[test]
fn compare_tells_of_sizes_before_it_tells_of_contents() {
    check(
        "
        peer create -q one.raw 1M
        peer create -q two.raw 2M
        io -f raw -c 'write -P 1 1536k 1k' two.raw
        peer create -q three.raw 2M
        io -f raw -c 'write -P 1 0 1k' three.raw
        peer create -q four.raw 2M
        says 1 compare -f raw -F raw one.raw two.raw
        says 1 compare -f raw -F raw two.raw one.raw
        says 1 compare -f raw -F raw one.raw three.raw
        says 1 compare -f raw -F raw two.raw three.raw
        says 0 compare -f raw -F raw one.raw four.raw
        says 1 compare -s -f raw -F raw one.raw two.raw
        says 1 compare -s -f raw -F raw one.raw four.raw
        says 1 compare -s -f raw -F raw two.raw three.raw
        says 1 compare -q -f raw -F raw one.raw two.raw
        says 0 compare -q -f raw -F raw one.raw four.raw
        says 1 compare -q -s -f raw -F raw one.raw two.raw
        ",
    );
}

#[test]
fn bitmaps_of_granularity_0_have_the_usual_one() {
    check(
        "
        peer create -q -f qcow2 a.qcow2 4M
        run bitmap --add -g 0 a.qcow2 b0
        fail 1 bitmap --add -g 256 a.qcow2 b1
        fail 1 bitmap --add -g x a.qcow2 b1
        json info --output=json a.qcow2
        same a.qcow2
        ",
    );
}

#[test]
fn numbers_that_are_no_sizes_have_no_suffix() {
    let mut script = "
        peer create -q raw.img 1M
        io -f raw -c 'write -P 1 0 1M' raw.img
    "
    .to_owned();
    for operand in ["count=0x10", "count=010", "skip=+1", "count=-0", "skip=010", "bs=1.5k", "bs=010", "'count= 5'"] {
        script += &format!("run dd if=raw.img of=out {operand}\nsame out\n");
    }
    for value in ["1k", "1.5", "08", "0x", "1b", "", "9E", "-1", "9223372036854775808", "5."] {
        script += &format!("fail 1 dd if=raw.img of=no count={value}\nfail 1 dd if=raw.img of=no skip={value}\n");
    }
    for value in ["x", "1k", "0", "17", "-1", "08"] {
        script += &format!("fail 1 convert -m {value} raw.img no\n");
    }
    script += "
        run convert -m 010 raw.img out
        fail 1 dd bs=1x if=raw.img of=no
        fail 1 dd bs=4G if=raw.img of=no
    ";
    check(&script);
}

#[test]
fn objects_are_described_in_both_forms() {
    let mut script = "peer create -q raw.img 1M\n".to_owned();
    for object in [
        r#"{"qom-type":"secret","id":"a","data":"x"}"#,
        r#"{"qom-type":"secret","id":"a","data":"eA==","format":"base64"}"#,
        "secret,id=a.b-_1,data=x",
    ] {
        script += &format!("run info --object '{object}' raw.img\n");
    }
    script += r#"
        file pass abc
        run create -q -f luks --object {"qom-type":"secret","id":"a","file":"pass"} -o key-secret=a,iter-time=10 l 1M
        run convert --image-opts --object {"qom-type":"secret","id":"a","data":"abc"} driver=luks,file.filename=l,key-secret=a out
    "#;
    for object in [
        r#"{"qom-type":"secret","id":"a"}"#,
        r#"{"qom-type":"secret","data":"x"}"#,
        r#"{"id":"a","data":"x"}"#,
        r#"{"qom-type":"foo","id":"a"}"#,
        r#"{"qom-type":5,"id":"a"}"#,
        r#"{"qom-type":"secret","id":"1a","data":"x"}"#,
        r#"{"qom-type":"secret","id":"a","data":"x","foo":"1"}"#,
        r#"{"qom-type":"secret","id":"a","data":1}"#,
        r#"{"qom-type":"secret","id":"a","data":"x","format":"hex"}"#,
        r#"{"qom-type":"secret","id":"a","data":"x","file":"y"}"#,
        r#"{"qom-type":"secret","id":"a","data":"x","keyid":"n","iv":"QUFBQUFBQUFBQUFBQUFBQQ=="}"#,
        r#"{"qom-type":"tls-creds-x509","id":"a"}"#,
        r#"{"qom-type":"tls-creds-x509","id":"a","endpoint":"client","dir":"/nowhere","verify-peer":true}"#,
        r#"{"qom-type":"tls-creds-x509","id":"a","endpoint":"client","dir":"/nowhere","verify-peer":"on"}"#,
        "[]",
        "{}",
        "foo,id=a",
        "foo",
        "id=a,data=x",
        "secret",
        "secret,id=",
        "secret,id=a",
        "secret,id=a,data",
        "secret,id=1a,data=x",
        "secret,data=x,foo=1",
        "secret,id=a,data=x,foo=1",
        "secret,id=a,data=x,format=hex,foo=1",
        "tls-creds-x509,id=a,verify-peer=maybe,dir=/nowhere",
    ] {
        script += &format!("fail 1 info --object '{object}' raw.img\n");
    }
    script += "
        fail 1 info --object secret,id=a,data=x --object secret,id=a,data=x raw.img
        code 1 info --object '{' raw.img
    ";
    check(&script);
}

#[test]
fn the_backing_file_is_not_amended() {
    check(
        "
        peer create -q -f qcow2 a 1M
        peer create -q -f qcow2 -b a -F qcow2 c
        fail 1 amend -o backing_fmt=raw c
        fail 1 amend -o backing_fmt=qcow2 c
        fail 1 amend -o backing_file=a c
        fail 1 amend -o backing_file=x,backing_fmt=qcow2 c
        fail 1 amend -o backing_file=a,backing_fmt=raw c
        fail 1 amend -o backing_fmt=raw a
        run amend -o backing_file=a,backing_fmt=qcow2 c
        same c
        ",
    );
}

#[test]
fn a_vmdk_is_committed_and_keeps_what_it_holds() {
    check(
        "
        peer create -q src.raw 4M
        peer convert -O vmdk src.raw s.vmdk
        peer create -q -f vmdk -b s.vmdk -F vmdk q.vmdk
        io -c 'write -P 3 0 64k' q.vmdk
        run commit q.vmdk
        same s.vmdk
        run map q.vmdk
        run commit -d q.vmdk
        same q.vmdk
        ",
    );
}

#[test]
fn other_vendors_have_limits() {
    check(
        "
        fail 1 create -f vdi a.vdi 600T
        fail 1 create -f vdi a.vdi 0x1fffff8000001
        fail 1 create -f vdi -o static=on a.vdi 600T
        fail 1 create -f vhdx -o log_size=0 a.vhdx 1M
        fail 1 create -f vhdx -o log_size=4G a.vhdx 1M
        fail 1 create -f vhdx -o log_size=8G a.vhdx 1M
        run create -f vhdx -o log_size=1000 a.vhdx 1M
        same a.vhdx
        code 1 create -f vhdx a.vhdx 65T
        ",
    );
}

#[test]
fn wrong_command_lines_are_named_in_getopt_s_words() {
    let mut script = "peer create -q -f qcow2 a 1M\n".to_owned();
    for line in [
        "-Z",
        "--foo",
        "--trace",
        "-T",
        "--help=1",
        "--",
        "",
        "-- -h",
        "foo",
        "create -Z",
        "create -qZf",
        "create -f",
        "create --foo=3",
        "create --f",
        "create --qui=1 x",
        "create a 1M x",
        "create",
        "info --f",
        "info --ou",
        "info -Z -h",
        "info -f raw --image-opts a",
        "info a a",
        "info --output=xml a",
        "check -r foo a",
        "convert a",
        "convert -s x a b",
        "convert -f raw --image-opts a b",
        "convert -O raw --target-image-opts a b",
        "measure a a",
        "measure -O",
        "compare a",
        "compare -Z",
        "bitmap --add a",
        "amend a",
        "amend -o compat=1.1",
        "rebase a",
        "resize a",
        "resize a 1M 2M",
        "snapshot -c x -d y a",
        "dd -n",
        "create json:{} 1M",
        "create -f qcow2 json:{\"driver\":\"raw\",\"file.filename\":\"x\"} 1M",
        "convert a json:{\"driver\":\"raw\",\"file.filename\":\"x\"}",
        "dd if=a of=json:x",
    ] {
        script += &format!("fail 1 {line}\n");
    }
    script += "
        fail 2 compare -f raw --image-opts a a
        run -- info a
        run -- info --force a
        ok -T foo info a
        ok info -h -Z
        ok --he
        ok create --he
        run convert --output-format raw --options size=1M --output-cache none a b
        run compare --left-format qcow2 --right-format raw a b
    ";
    for format in ["vmdk", "vdi", "vpc", "vhdx"] {
        script += &format!("peer create -q -f {format} t 4M\n");
        for line in ["t 8M", "-f {} t 8M", "--shrink t 1M", "--shrink t 4M", "--preallocation=full t 8M"] {
            script += &format!("fail 1 resize {}\n", line.replace("{}", format));
        }
        script += "same t\n";
    }
    check(&script);
}

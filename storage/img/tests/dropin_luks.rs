//! Callers of qemu-img with encrypted images do not notice: their command lines, through this tool and through qemu-img.
//! Keys and salts are random, so images of both are compared by what opens them and by what they hold.

mod support;

use support::check;

/// A passphrase, another one, a plain disk, and volumes of both kinds with its contents.
const IMAGES: &str = "
    file key swordfish
    file other marlin
    peer create -q -f raw plain.raw 3M
    io -f raw -c 'write -P 7 64k 200k' -c 'write -P 9 2M 12k' plain.raw
    ok convert KEY -O luks -o key-secret=s,iter-time=10 plain.raw v.luks
    # by one thread: others would lay clusters out in the order in which they have encrypted them
    ok convert KEY -m 1 -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 plain.raw v.qcow2
";

/// Runs a script over [`IMAGES`]; some words stand for others.
fn check_images(script: &str) {
    let script = format!("{IMAGES}{script}")
        .replace("OPTS", "KEY --image-opts")
        .replace("LUKS", "driver=luks,file.filename=v.luks,key-secret=s")
        .replace("QCOW2", "driver=qcow2,file.filename=v.qcow2,encrypt.key-secret=s")
        .replace("PLAIN", "driver=raw,file.filename=plain.raw")
        .replace("OTHER", "--object secret,id=o,file=other")
        .replace("WRONG", "--object secret,id=s,file=other")
        .replace("KEY", "--object secret,id=s,file=key");
    check(&script);
}

#[test]
fn images_are_created_as_libvirt_nova_and_cinder_do() {
    check_images(
        "
        # libvirt
        run create KEY -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 a.qcow2 10240K
        run create KEY -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-alg=aes-256,encrypt.cipher-mode=xts,encrypt.hash-alg=sha256,encrypt.iter-time=10,compat=1.1 b.qcow2 10240K
        run create KEY -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.ivgen-alg=essiv,encrypt.iter-time=10,compat=0.10,cluster_size=4k c.qcow2 1M
        # cinder
        run create --object secret,id=s,format=raw,file=key -f luks -o cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain64,key-secret=s,iter-time=10 c.luks 10M
        # options that repeat, as nova's
        run create KEY -f qcow2 -o encrypt.key-secret=s -o encrypt.format=luks -o encrypt.iter-time=10 n.qcow2 1M
        run create --object secret,id=s,data=c3dvcmRmaXNo,format=base64 -f luks -o key-secret=s,iter-time=10,hash-alg=sha1 d.luks 1000
        run create KEY -f luks -o key-secret=s,iter-time=10,hash-alg=sha512,ivgen-alg=essiv e.luks 1M
        run create KEY -f luks -o key-secret=s,iter-time=0,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256 f.luks 1M
        run create KEY -f luks -o key-secret=s,iter-time=10,preallocation=falloc g.luks 1M
        run create KEY -f luks -o key-secret=s,iter-time=10,preallocation=metadata h.luks 1M
        run create KEY -f luks -o key-secret=s,iter-time=10,cipher-alg=aes-128,cipher-mode=ecb,size=2M i.luks
        json info --output=json a.qcow2
        json info --output=json b.qcow2
        json info --output=json c.qcow2
        json info --output=json n.qcow2
        json info --output=json c.luks
        json info --output=json d.luks
        json info --output=json e.luks
        json info --output=json f.luks
        json info --output=json i.luks
        json info --output=json --image-opts LUKS
        ok info --output=json --image-opts QCOW2
        peer check OPTS driver=qcow2,file.filename=c.qcow2,encrypt.key-secret=s
        ours check OPTS driver=qcow2,file.filename=c.qcow2,encrypt.key-secret=s
        # each opens what the other made, whose passphrase is the same however it was given
        peer map --output=json OPTS driver=luks,file.filename=d.luks,key-secret=s
        ours map --output=json OPTS driver=luks,file.filename=d.luks,key-secret=s
        run create -f luks -o help
        run amend -f luks -o help
        # a key that is itself encrypted: printf swordfish | openssl enc -aes-256-cbc -K 6b..6b -iv 41..41 -base64
        run map --output=json --object secret,id=k,data=a2tra2tra2tra2tra2tra2tra2tra2tra2tra2tra2s=,format=base64 --object secret,id=s,keyid=k,iv=QUFBQUFBQUFBQUFBQUFBQQ==,data=bAN6FCPei9Aho/cOtIplXA==,format=base64 --image-opts LUKS
        ",
    );
}

#[test]
fn both_read_what_both_wrote() {
    check_images(
        "
        run compare OPTS LUKS PLAIN
        run compare OPTS QCOW2 LUKS
        peer compare OPTS LUKS PLAIN
        peer compare OPTS QCOW2 PLAIN
        ours compare OPTS LUKS PLAIN
        ours compare OPTS QCOW2 PLAIN
        run check OPTS QCOW2
        peer check OPTS QCOW2
        ours check OPTS QCOW2
        fail 63 check OPTS LUKS
        # from one encryption to another, and out of it
        ok convert OPTS -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 LUKS x.qcow2
        ok convert OPTS OTHER -O luks -o key-secret=o,iter-time=10 QCOW2 x.luks
        ok convert OPTS -O raw LUKS x.raw
        same x.raw
        ok convert OPTS -O qcow2 QCOW2 y.qcow2
        same y.qcow2
        ok convert OPTS -c -O qcow2 LUKS z.qcow2
        same z.qcow2
        peer compare OPTS driver=qcow2,file.filename=x.qcow2,encrypt.key-secret=s PLAIN
        ours compare OPTS driver=qcow2,file.filename=x.qcow2,encrypt.key-secret=s PLAIN
        peer compare OPTS OTHER driver=luks,file.filename=x.luks,key-secret=o PLAIN
        ours compare OPTS OTHER driver=luks,file.filename=x.luks,key-secret=o PLAIN
        # into a volume that is there, as libvirt does
        ok create KEY -f luks -o key-secret=s,iter-time=10 there.luks 3M
        ok convert KEY -f raw -n --target-image-opts plain.raw driver=luks,file.filename=there.luks,key-secret=s
        peer compare OPTS driver=luks,file.filename=there.luks,key-secret=s PLAIN
        ours compare OPTS driver=luks,file.filename=there.luks,key-secret=s PLAIN
        ok create KEY -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,preallocation=metadata there.qcow2 3M
        ok convert KEY -f raw -n --target-image-opts plain.raw driver=qcow2,file.filename=there.qcow2,encrypt.key-secret=s
        peer compare OPTS driver=qcow2,file.filename=there.qcow2,encrypt.key-secret=s PLAIN
        ours compare OPTS driver=qcow2,file.filename=there.qcow2,encrypt.key-secret=s PLAIN
        run dd OPTS bs=64k count=40 if=LUKS of=dd.raw
        same dd.raw
        # each writes into the other's, also less than a sector
        io OPTS -c 'write -P 1 100 3000' -c 'write -P 2 1M 70000' -c 'write -z 2M 64k' -c 'discard 64k 64k' LUKS
        io OPTS -c 'write -P 1 100 3000' -c 'write -P 2 1M 70000' -c 'write -z 2M 64k' -c 'discard 64k 64k' QCOW2
        ours compare OPTS LUKS driver=luks,file.filename=v.luks,key-secret=s
        ok convert OPTS -O raw LUKS l.raw
        ok convert OPTS -O raw QCOW2 q.raw
        same l.raw
        same q.raw
        ",
    );
}

#[test]
fn encrypted_images_are_looked_at_measured_and_resized() {
    check_images(
        "
        run map --output=json OPTS LUKS
        run map --output=json OPTS QCOW2
        fail 1 map OPTS LUKS
        fail 1 map OPTS QCOW2
        run measure OPTS LUKS
        run measure -O luks -o key-secret=s OPTS LUKS
        run measure -O qcow2 OPTS QCOW2
        run measure -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-alg=aes-128 OPTS QCOW2
        run measure KEY -O luks -o key-secret=s,cipher-alg=aes-128 --size 3M
        run resize OPTS LUKS 5M
        run resize OPTS LUKS +1M
        fail 1 resize OPTS LUKS 2M
        run resize --shrink OPTS LUKS 3M
        run compare OPTS LUKS PLAIN
        run resize OPTS QCOW2 5M
        run resize OPTS --preallocation=metadata QCOW2 6M
        run resize OPTS --shrink QCOW2 3M
        run compare OPTS QCOW2 PLAIN
        peer check OPTS QCOW2
        json info --output=json v.luks
        json info --output=json v.qcow2
        run snapshot OPTS -c one QCOW2
        io OPTS -c 'write -P 3 0 128k' QCOW2
        run snapshot OPTS -a one QCOW2
        run compare OPTS QCOW2 PLAIN
        ok snapshot OPTS -l QCOW2
        run snapshot OPTS -d one QCOW2
        run bitmap OPTS --add QCOW2 b0
        json info --output=json v.qcow2
        run amend OPTS -o lazy_refcounts=on QCOW2
        run amend OPTS -o refcount_bits=32 QCOW2
        peer check OPTS QCOW2
        peer compare OPTS QCOW2 PLAIN
        ",
    );
}

#[test]
fn chains_have_encrypted_layers() {
    check_images(
        "
        ok create KEY OTHER -f qcow2 -u -o encrypt.format=luks,encrypt.key-secret=o,encrypt.iter-time=10 -b v.qcow2 -F qcow2 top.qcow2 3M
        ok create KEY OTHER -f qcow2 -o encrypt.format=luks,encrypt.key-secret=o,encrypt.iter-time=10 -b plain.raw -F raw over.qcow2
        io OTHER --image-opts -c 'write -P 5 1000 1000' -c 'write -P 6 1M 1M' driver=qcow2,file.filename=over.qcow2,encrypt.key-secret=o
        run compare OPTS OTHER driver=qcow2,file.filename=top.qcow2,encrypt.key-secret=o,backing.encrypt.key-secret=s PLAIN
        fail 1 map OTHER --image-opts driver=qcow2,file.filename=top.qcow2,encrypt.key-secret=o
        run map --output=json OPTS OTHER driver=qcow2,file.filename=top.qcow2,encrypt.key-secret=o,backing.encrypt.key-secret=s
        run convert OTHER --image-opts -O raw driver=qcow2,file.filename=over.qcow2,encrypt.key-secret=o over.raw
        same over.raw
        run rebase OTHER --image-opts -b '' driver=qcow2,file.filename=over.qcow2,encrypt.key-secret=o
        peer compare OTHER --image-opts driver=qcow2,file.filename=over.qcow2,encrypt.key-secret=o driver=raw,file.filename=over.raw
        ours compare OTHER --image-opts driver=qcow2,file.filename=over.qcow2,encrypt.key-secret=o driver=raw,file.filename=over.raw
        run create OTHER -f qcow2 -o encrypt.format=luks,encrypt.key-secret=o,encrypt.iter-time=10 -b over.raw -F raw c.qcow2
        io OTHER --image-opts -c 'write -P 8 512k 100k' driver=qcow2,file.filename=c.qcow2,encrypt.key-secret=o
        run commit OTHER --image-opts driver=qcow2,file.filename=c.qcow2,encrypt.key-secret=o
        same over.raw
        run rebase -u OTHER --image-opts -b plain.raw -F raw driver=qcow2,file.filename=c.qcow2,encrypt.key-secret=o
        run compare OTHER --image-opts driver=qcow2,file.filename=c.qcow2,encrypt.key-secret=o PLAIN
        ",
    );
}

#[test]
fn key_slots_are_amended() {
    check_images(
        "
        fail 1 amend OPTS OTHER -o new-secret=o LUKS
        fail 1 amend OPTS OTHER -o state=active LUKS
        fail 1 amend OPTS OTHER -o state=sleeping LUKS
        run amend OPTS OTHER -o state=active,new-secret=o,iter-time=10 LUKS
        peer compare --object secret,id=s,file=other --image-opts LUKS PLAIN
        ours compare --object secret,id=s,file=other --image-opts LUKS PLAIN
        fail 1 amend OPTS OTHER -o state=active,new-secret=o,iter-time=10,keyslot=1 LUKS
        run amend OPTS OTHER -o state=active,new-secret=o,iter-time=10,keyslot=1 --force LUKS
        fail 1 amend OPTS OTHER -o state=active,new-secret=o,iter-time=10,keyslot=8 LUKS
        fail 1 amend OPTS OTHER -o state=active,new-secret=nobody,iter-time=10 LUKS
        run amend OPTS OTHER -o state=active,new-secret=o,iter-time=10,keyslot=5 LUKS
        fail 1 amend OPTS OTHER -o state=active,new-secret=o,old-secret=s,iter-time=10 LUKS
        json info --output=json v.luks
        fail 1 amend OPTS OTHER -o state=inactive LUKS
        fail 1 amend OPTS OTHER -o state=inactive,new-secret=o LUKS
        fail 1 amend OPTS OTHER -o state=inactive,iter-time=10,keyslot=1 LUKS
        fail 1 amend OPTS OTHER -o state=inactive,keyslot=7 LUKS
        fail 1 amend OPTS OTHER -o state=inactive,keyslot=9 LUKS
        fail 1 amend OPTS OTHER -o state=inactive,keyslot=5,old-secret=s LUKS
        run amend OPTS OTHER -o state=inactive,keyslot=5 LUKS
        run amend OPTS OTHER -o state=inactive,old-secret=o LUKS
        json info --output=json v.luks
        fail 1 amend OPTS OTHER -o state=inactive,old-secret=o LUKS
        fail 1 amend OPTS OTHER -o state=inactive,old-secret=s LUKS
        fail 1 amend OPTS OTHER -o state=inactive,keyslot=0 LUKS
        fail 1 amend OPTS OTHER -o state=inactive,keyslot=0,old-secret=s LUKS
        fail 1 amend OPTS -o size=5M LUKS
        fail 1 amend OPTS -o cipher-alg=aes-128 LUKS
        fail 1 amend OTHER -f luks -o state=active,new-secret=o v.luks
        fail 1 amend WRONG OTHER --image-opts -o state=active,new-secret=o LUKS
        run compare OPTS LUKS PLAIN
        run amend OPTS OTHER -o state=inactive,keyslot=0 --force LUKS
        fail 1 map OPTS LUKS
        # the same inside qcow2
        run amend OPTS OTHER -o encrypt.state=active,encrypt.new-secret=o,encrypt.iter-time=10 QCOW2
        run amend OPTS OTHER -o encrypt.state=inactive,encrypt.old-secret=s QCOW2
        json info --output=json v.qcow2
        fail 1 map OPTS QCOW2
        peer compare --object secret,id=s,file=other --image-opts QCOW2 PLAIN
        ours compare --object secret,id=s,file=other --image-opts QCOW2 PLAIN
        fail 1 amend OPTS OTHER -o encrypt.state=inactive,encrypt.old-secret=o driver=qcow2,file.filename=v.qcow2,encrypt.key-secret=o
        fail 1 amend OPTS OTHER -o encrypt.cipher-alg=aes-128 driver=qcow2,file.filename=v.qcow2,encrypt.key-secret=o
        fail 1 amend OPTS OTHER -o encrypt.format=luks driver=qcow2,file.filename=v.qcow2,encrypt.key-secret=o
        ok create -f qcow2 p.qcow2 1M
        fail 1 amend OTHER -o encrypt.state=active,encrypt.new-secret=o p.qcow2
        ",
    );
}

#[test]
fn all_slots_can_be_used() {
    let fill = "run amend OPTS OTHER -o state=active,new-secret=o,iter-time=0 LUKS\n".repeat(7);
    check_images(&format!(
        "{fill}
        fail 1 amend OPTS OTHER -o state=active,new-secret=o,iter-time=0 LUKS
        run amend OPTS OTHER -o state=active,new-secret=o,iter-time=0,keyslot=3 --force LUKS
        json info --output=json v.luks
        run amend OPTS OTHER -o state=inactive,old-secret=o LUKS
        json info --output=json v.luks
        run compare OPTS LUKS PLAIN
        "
    ));
}

#[test]
fn without_the_right_key_nothing_opens() {
    check_images(
        "
        fail 1 map v.luks
        fail 1 map v.qcow2
        fail 1 map WRONG --image-opts LUKS
        fail 1 map WRONG --image-opts QCOW2
        fail 1 map --image-opts LUKS
        fail 1 map --image-opts QCOW2
        fail 1 convert -O raw v.luks o.raw
        fail 1 convert WRONG --image-opts -O raw LUKS o.raw
        fail 1 convert -f raw -O luks plain.raw o.luks
        fail 1 convert -f raw -O luks -o key-secret=s plain.raw o.luks
        fail 1 convert KEY -c -f raw -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s plain.raw o.qcow2
        fail 1 convert KEY -c -f raw -O luks -o key-secret=s plain.raw o.luks
        fail 1 check v.luks
        fail 1 check v.qcow2
        fail 1 check -f luks v.luks
        fail 1 check WRONG --image-opts QCOW2
        fail 1 check --image-opts QCOW2
        fail 1 snapshot -l v.qcow2
        fail 1 snapshot -c one v.qcow2
        fail 1 resize v.luks 5M
        fail 1 resize v.qcow2 5M
        fail 1 resize WRONG --image-opts LUKS 5M
        fail 1 rebase -u -b '' v.qcow2
        fail 1 amend -o lazy_refcounts=on v.qcow2
        fail 1 bitmap --add v.qcow2 b0
        fail 1 commit v.qcow2
        fail 2 compare v.qcow2 v.luks
        fail 1 dd if=plain.raw of=dd.luks -O luks
        fail 1 measure -O luks --size 1M
        fail 1 measure -O luks --size 1M -o key-secret=s
        fail 1 create -f luks x.luks 1M
        fail 1 create -f luks -o key-secret=nobody x.luks 1M
        fail 1 create KEY -f luks -o key-secret=s,cipher-alg=rot13 x.luks 1M
        fail 1 create KEY -f luks -o key-secret=s,cipher-mode=rot13 x.luks 1M
        fail 1 create KEY -f luks -o key-secret=s,hash-alg=rot13 x.luks 1M
        fail 1 create KEY -f luks -o key-secret=s,ivgen-alg=rot13 x.luks 1M
        fail 1 create KEY -f luks -o key-secret=s,ivgen-alg=essiv,ivgen-hash-alg=sha1 x.luks 1M
        fail 1 create KEY -f luks -o key-secret=s,detached-header=on x.luks 1M
        fail 1 create -f qcow2 -o encrypt.format=luks x.qcow2 1M
        fail 1 create -f qcow2 -o encrypt.format=luks,encrypt.key-secret=nobody x.qcow2 1M
        fail 1 create KEY -f qcow2 -o encrypt.format=rot13,encrypt.key-secret=s x.qcow2 1M
        fail 1 create KEY -f qcow2 -o encrypt.key-secret=s x.qcow2 1M
        fail 1 create KEY -f qcow2 -o encryption=on,encrypt.format=luks,encrypt.key-secret=s x.qcow2 1M
        fail 1 create KEY -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-alg=rot13 x.qcow2 1M
        # what is no volume
        fail 1 info -f luks plain.raw
        copy v.luks two.luks
        poke two.luks 6 0002
        fail 1 info -f luks two.luks
        json info --output=json two.luks
        copy v.luks none.luks
        poke none.luks 104 00000001
        fail 1 info none.luks
        ",
    );
}

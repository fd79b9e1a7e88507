//! Callers of qemu-img do not notice: their command lines, through this tool and through qemu-img.

mod support;

use support::{FILLED, check};

#[test]
fn create_is_called_by_libvirt_nova_cinder_and_proxmox() {
    check(
        "
        run create -f raw disk.raw 10240K
        same disk.raw
        run create -f qcow2 base.qcow2 1024K
        same base.qcow2
        # libvirt's snapshots: no size, it is the backing file's
        run create -f qcow2 -o backing_fmt=qcow2,backing_file=base.qcow2 snap.qcow2
        same snap.qcow2
        # nova
        run create -f qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2,size=2097152 disk.local
        same disk.local
        run create -f qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 disk.swap 5M
        same disk.swap
        # Proxmox, options behind the file
        run create -F qcow2 -b base.qcow2 -f qcow2 linked.qcow2 -o cluster_size=128k
        same linked.qcow2
        run create -fqcow2 -b base.qcow2 -Fqcow2 -- -odd.qcow2
        ok create -q -f qcow2 quiet.qcow2 1M
        run create -f qcow2 -o compat=0.10 old.qcow2 1G
        same old.qcow2
        run create -f qcow2 -u -b nowhere.qcow2 -F qcow2 blind.qcow2 1M
        run create -f qcow2 empty.qcow2 0
        same empty.qcow2
        # libvirt's volumes, Proxmox's snapshots
        run create -f qcow2 -o preallocation=metadata,compat=1.1,lazy_refcounts meta.qcow2 10240K
        same meta.qcow2
        run create -f qcow2 -o preallocation=falloc,compat=1.1 falloc.qcow2 1024K
        same falloc.qcow2
        run create -o preallocation=metadata -f qcow2 meta2.qcow2 1024K
        same meta2.qcow2
        run create -F qcow2 -b base.qcow2 -f qcow2 pve.qcow2 -o extended_l2=on,cluster_size=128k
        same pve.qcow2
        run create -F qcow2 -b base.qcow2 -f qcow2 pve2.qcow2 -o extended_l2=on,cluster_size=128k,preallocation=metadata
        same pve2.qcow2
        run create -f qcow2 -o cluster_size=512,refcount_bits=1,compression_type=zstd many.qcow2 5M
        same many.qcow2
        run create -f qcow2 -o preallocation=full full.qcow2 1M
        same full.qcow2
        run create -f raw -o preallocation=falloc falloc.raw 1M
        same falloc.raw
        run create -f raw -o preallocation=full full.raw 1M
        same full.raw
        run create -f qcow2 -b 'json:{\"driver\":\"qcow2\",\"file.filename\":\"base.qcow2\"}' -F qcow2 layered.qcow2
        ok info layered.qcow2
        # an existing file is replaced in place
        run create -f qcow2 full.raw 3M
        same full.raw
        run create odd.raw 1000
        same odd.raw
        run create -f qcow2 odd.qcow2 1000
        same odd.qcow2
        ",
    );
}

#[test]
fn images_of_other_vendors_are_created() {
    check(
        "
        run create -f vmdk a.vmdk 10M
        same a.vmdk
        run create -f vmdk -o adapter_type=lsilogic,hwversion=8,toolsversion=12345,zeroed_grain=on b.vmdk 3G
        same b.vmdk
        run create -f vmdk -o subformat=streamOptimized s.vmdk 10M
        run create -f vdi a.vdi 10M
        same a.vdi
        run create -f vdi -o static=on s.vdi 10M
        same s.vdi
        run create -f vpc a.vpc 10M
        same a.vpc
        run create -f vpc -o subformat=fixed,force_size=on f.vpc 10M
        run create -f vpc -o subformat=fixed,force_size=on f.vpc 11M
        run create -f vhdx a.vhdx 10M
        same a.vhdx
        run create -f vhdx -o subformat=fixed,block_size=2M,log_size=4M f.vhdx 10M
        same f.vhdx
        fail 1 create -f vmdk -o subformat=foo x 1M
        fail 1 create -f vmdk -o adapter_type=foo x 1M
        fail 1 create -f vmdk -o compat6=on,hwversion=4 x 1M
        ",
    );
}

#[test]
fn create_refuses_what_qemu_img_refuses() {
    check(
        "
        peer create -q -f qcow2 base.qcow2 10M
        fail 1 create -f qcow2 x
        fail 1 create -f qcow2 x -- -1
        fail 1 create -f qcow2 x 8E
        fail 1 create -f qcow2 x abc
        fail 1 create -f qcow2 x 1.5
        fail 1 create -f qcow2 x 9223372036854775807
        fail 1 create -f foo x 1M
        fail 1 create -f qcow2 -o foo=1 x 1M
        fail 1 create -f qcow2 -o size x
        fail 1 create -f qcow2 -o size=2M x 1M
        fail 1 create -f qcow2 -o cluster_size=3k x 1M
        fail 1 create -f qcow2 -o cluster_size=4M x 1M
        fail 1 create -f qcow2 -o cluster_size=-1 x 1M
        fail 1 create -f qcow2 -o compat=9 x 1M
        fail 1 create -f qcow2 -o compat=0.10,lazy_refcounts=on x 1M
        fail 1 create -f qcow2 -o compat=0.10,refcount_bits=8 x 1M
        fail 1 create -f qcow2 -o refcount_bits=7 x 1M
        fail 1 create -f qcow2 -o preallocation=foo x 1M
        fail 1 create -f qcow2 -o lazy_refcounts=maybe x 1M
        fail 1 create -f qcow2 -o extended_l2=on,cluster_size=4k x 1M
        fail 1 create -f qcow2 -o compression_type=lz x 1M
        fail 1 create -f qcow2 -o compat=0.10,compression_type=zstd x 1M
        fail 1 create -f qcow2 -b base.qcow2 x
        fail 1 create -f qcow2 -b base.qcow2 -F foo x
        fail 1 create -f qcow2 -b nope -F qcow2 x
        fail 1 create -f qcow2 -b nope -F qcow2 x 1M
        fail 1 create -f qcow2 -u -b nope -F qcow2 x
        fail 1 create -f qcow2 -b base.qcow2 -F qcow2 base.qcow2
        fail 1 create -f raw -b base.qcow2 -F qcow2 x
        fail 1 create -f qcow2 -F qcow2 x 1M
        fail 1 create -f qcow2 -b '' -F qcow2 x 1M
        fail 1 create -f qcow2 -b base.qcow2 -F qcow2 -o preallocation=metadata x
        fail 1 create -f raw -o preallocation=metadata x 1M
        fail 1 create -f qcow2 -o data_file_raw=on x 1M
        fail 1 create -f qcow2 /nowhere/x 1M
        fail 1 create -f qcow2 . 1M
        fail 1 create -f qcow2 a:b 1M
        fail 1 create -f qcow2 x 100P
        fail 1 create -f qcow2 -o cluster_size=512 x 1T
        usage create
        usage create -f qcow2 x 1M 2M
        usage create -f
        usage create --frob x 1M
        usage frobnicate
        same base.qcow2
        ",
    );
}

#[test]
fn info_is_called_by_everyone() {
    check(
        "
        peer create -q -f qcow2 base.qcow2 1G
        peer create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2
        peer create -q -f qcow2 -o compat=0.10,cluster_size=4k old.qcow2 10M
        peer create -q -f qcow2 -o lazy_refcounts=on,refcount_bits=64,compression_type=zstd new.qcow2 33M
        peer create -q raw.img 10M
        run info base.qcow2
        run info top.qcow2
        run info ./top.qcow2
        run info --backing-chain top.qcow2
        run info old.qcow2
        run info new.qcow2
        run info raw.img
        json info base.qcow2 --force-share --output=json -f qcow2
        json info -U --output json ./top.qcow2
        json info --output=json top.qcow2 -f qcow2 --backing-chain
        json info -f raw --output=json base.qcow2
        run info file:top.qcow2
        run info --image-opts driver=qcow2,file.driver=file,file.filename=top.qcow2
        json info --output=json 'json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"base.qcow2\"}}'
        ",
    );
}

#[test]
fn info_refuses_what_qemu_img_refuses() {
    check(
        "
        peer create -q raw.img 1M
        peer create -q -f qcow2 a.qcow2 1M
        fail 1 info nope
        fail 1 info -f qcow2 raw.img
        fail 1 info -f foo raw.img
        fail 1 info .
        fail 1 info foo:bar
        fail 1 info ''
        fail 1 info --image-opts driver=foo,file.filename=a.qcow2
        fail 1 info --image-opts a.qcow2
        usage info -f qcow2 --image-opts driver=qcow2,file.filename=a.qcow2
        usage info
        usage info raw.img a.qcow2
        usage info --bogus raw.img
        usage info --output=xml raw.img
        ",
    );
}

#[test]
fn check_is_called_by_vdsm_and_people() {
    check(
        "
        peer create -q -f qcow2 a.qcow2 10M
        io -f qcow2 -c 'write -P 1 0 1M' -c 'write -P 2 3M 100k' a.qcow2
        peer create -q raw.img 1M
        run check a.qcow2
        json check --output json -f qcow2 a.qcow2
        ok check -q a.qcow2
        fail 63 check raw.img
        fail 1 check nope
        fail 1 check -T foo a.qcow2
        fail 1 check -r all -U a.qcow2
        usage check -r foo a.qcow2
        ",
    );
}

#[test]
fn map_is_called_by_vdsm() {
    check(
        "
        peer create -q -f qcow2 base.qcow2 1M
        io -c 'write -P 1 0 128k' -c 'write -z 256k 64k' -c 'write -z -u 384k 64k' base.qcow2
        peer create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2 2M
        io -c 'write -P 3 64k 64k' -c 'write -P 3 1M 64k' -c 'write -z 1M 64k' top.qcow2
        peer create -q raw.img 1M
        io -f raw -c 'write -P 1 256k 64k' raw.img
        peer create -q -f qcow2 -b raw.img -F raw over.qcow2 2M
        peer create -q -f qcow2 pressed.qcow2 1M
        io -c 'write -P 1 0 64k' -c 'write -c -P 4 512k 64k' pressed.qcow2
        peer create -q empty.img 0
        run map --output=json base.qcow2
        run map --output=json top.qcow2
        run map --output=json raw.img
        run map --output=json over.qcow2
        run map --output=json pressed.qcow2
        run map --output=json empty.img
        run map --output=json --start-offset 100k --max-length 200k raw.img
        run map --output=json -s 2M raw.img
        run map --output=json --max-length 0 raw.img
        run map base.qcow2
        run map top.qcow2
        run map -f raw raw.img
        run map over.qcow2
        run map -U empty.img
        fail 1 map pressed.qcow2
        fail 1 map --start-offset abc raw.img
        fail 1 map --max-length -1 raw.img
        fail 1 map -f foo raw.img
        usage map --output=foo raw.img
        ",
    );
}

#[test]
fn measure_is_called_by_vdsm_and_proxmox() {
    check(
        "
        peer create -q -f qcow2 base.qcow2 1M
        io -c 'write -P 1 0 128k' -c 'write -z 256k 64k' base.qcow2
        peer create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2 2M
        io -c 'write -P 3 61k 5k' -c 'write -c -P 4 512k 64k' -c 'write -z 1M 64k' top.qcow2
        peer create -q raw.img 1000000
        io -f raw -c 'write -P 1 256k 64k' raw.img
        json measure --output=json --size 10485760K -O qcow2
        json measure --output=json --size 10G -O qcow2 -o cluster_size=128k,extended_l2=on
        run measure --size 10G
        run measure --size 1000
        run measure --size 1000 -O qcow2
        run measure --size 0 -O qcow2
        run measure --size 10G -O qcow2 -o cluster_size=4k
        run measure --size 1M -O qcow2 -o preallocation=full
        run measure --size 1M -O qcow2 -o compat=0.10
        run measure --size 1T -O qcow2 -o extended_l2=on,refcount_bits=1,cluster_size=2M
        run measure --size 1T -O qcow2 -o refcount_bits=64,cluster_size=512k
        run measure -O qcow2 top.qcow2
        run measure -O qcow2 -f raw raw.img
        run measure -O qcow2 -o cluster_size=4k raw.img
        run measure -O qcow2 -o size=2M top.qcow2
        run measure -O raw top.qcow2
        run measure -O qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 top.qcow2
        run measure -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s --object secret,id=s,data=x --size 1M
        run measure -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s,cluster_size=4k --object secret,id=s,data=x --size 1M
        run measure -O luks -o key-secret=s --object secret,id=s,data=x --size 1M
        fail 1 measure -O vmdk raw.img
        fail 1 measure -O luks --size 1M
        fail 1 measure -O foo --size 1M
        fail 1 measure -O qcow2
        fail 1 measure -O qcow2 --size 1M raw.img
        fail 1 measure -O qcow2 --size 100P
        fail 1 measure -O qcow2 --size abc
        fail 1 measure -O qcow2 --size 1M -o foo=1
        fail 1 measure -O qcow2 --size 1M -f qcow2
        fail 1 measure -O qcow2 --size 1M -o cluster_size=3k
        fail 1 measure -O qcow2 nope
        ",
    );
}

#[test]
fn snapshot_is_called_by_libvirt_and_proxmox() {
    check(
        "
        peer create -q -f qcow2 disk.qcow2 10M
        io -c 'write -P 1 0 1M' disk.qcow2
        peer create -q raw.img 1M
        run snapshot disk.qcow2
        run snapshot -l disk.qcow2
        run snapshot -c one disk.qcow2
        io -c 'write -P 2 512k 1M' disk.qcow2
        run snapshot -c two disk.qcow2
        run snapshot -c two disk.qcow2
        same disk.qcow2
        json info --output=json disk.qcow2 --backing-chain
        run snapshot -a one disk.qcow2
        same disk.qcow2
        run snapshot -d two disk.qcow2
        same disk.qcow2
        run snapshot -a 3 disk.qcow2
        same disk.qcow2
        run snapshot -d one -- disk.qcow2
        run snapshot -d two disk.qcow2
        run snapshot -q -l disk.qcow2
        same disk.qcow2
        run snapshot -l raw.img
        fail 1 snapshot -d nope disk.qcow2
        fail 1 snapshot -a nope disk.qcow2
        fail 1 snapshot -d x raw.img
        fail 1 snapshot -c x raw.img
        fail 1 snapshot -a x -f raw raw.img
        fail 1 snapshot -U -c x disk.qcow2
        fail 1 snapshot -l nope
        usage snapshot -c x -d y disk.qcow2
        usage snapshot
        ",
    );
}

#[test]
fn convert_is_called_by_everyone() {
    check(&format!(
        "{FILLED}
        # nova
        run convert -t none -O raw -f qcow2 top.qcow2 n1.raw
        same n1.raw
        run convert -t writeback -O qcow2 -f raw raw.img n2.qcow2
        same n2.qcow2
        run convert -t none -O qcow2 -c -f qcow2 top.qcow2 n3.qcow2
        same n3.qcow2
        # cinder
        run convert -O raw -t none -f qcow2 -S 0 base.qcow2 c1.raw
        same c1.raw
        # Proxmox
        ok convert -p -f qcow2 -O raw -t none -T none top.qcow2 p1.raw
        same p1.raw
        # libvirt
        run convert -f qcow2 -O qcow2 -o preallocation=metadata,compat=1.1,lazy_refcounts base.qcow2 l1.qcow2
        same l1.qcow2
        # vdsm: json names, into an image that is there
        peer create -q -f qcow2 v1.qcow2 10M
        ok convert -p -t none -T none -f qcow2 -O qcow2 -W -n top.qcow2 v1.qcow2
        same v1.qcow2
        # people
        run convert -O qcow2 top.qcow2 h1.qcow2
        same h1.qcow2
        run convert top.qcow2 -O qcow2 -c -o compression_type=zstd,cluster_size=128k h2.qcow2 -m 2 -W
        same h2.qcow2
        run convert -O qcow2 -B base.qcow2 -F qcow2 top.qcow2 h3.qcow2
        same h3.qcow2
        run convert -O qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 top.qcow2 h4.qcow2
        same h4.qcow2
        run convert raw.img base.qcow2 both.raw
        same both.raw
        run convert -O qcow2 -o size=16M raw.img larger.qcow2
        same larger.qcow2
        run convert -C -O raw raw.img range.raw
        same range.raw
        run convert -q -p raw.img quiet.raw
        run convert --image-opts -O raw driver=qcow2,file.driver=file,file.filename=top.qcow2 opts.raw
        same opts.raw
        peer create -q -f qcow2 there.qcow2 10M
        run convert -n --target-image-opts top.qcow2 driver=qcow2,file.filename=there.qcow2
        same there.qcow2
        run convert -n --target-is-zero -O qcow2 raw.img there.qcow2
        "
    ));
}

#[test]
fn convert_refuses_what_qemu_img_refuses() {
    check(&format!(
        "{FILLED}
        peer create -q -f qcow2 big.qcow2 16M
        fail 1 convert -O foo base.qcow2 out
        fail 1 convert -f foo base.qcow2 out
        fail 1 convert nope out
        fail 1 convert -O raw -c base.qcow2 out
        fail 1 convert -O qcow2 -o foo=1 base.qcow2 out
        fail 1 convert -O qcow2 -o cluster_size=3k base.qcow2 out
        fail 1 convert -n -O raw base.qcow2 nope2
        fail 1 convert -n -O raw base.qcow2 raw.img
        fail 1 convert -n -O qcow2 base.qcow2 raw.img
        fail 1 convert --target-is-zero -O raw base.qcow2 out
        fail 1 convert -O qcow2 -B base.qcow2 top.qcow2 out
        fail 1 convert -O raw -B base.qcow2 -F qcow2 top.qcow2 out
        fail 1 convert -O qcow2 -B nope -F qcow2 top.qcow2 out
        fail 1 convert -m 0 base.qcow2 out
        fail 1 convert -m 17 base.qcow2 out
        fail 1 convert -S abc base.qcow2 out
        fail 1 convert -S 1000 base.qcow2 out
        fail 1 convert -t foo base.qcow2 out
        fail 1 convert -T foo base.qcow2 out
        fail 1 convert -C -c -O qcow2 base.qcow2 out
        fail 1 convert -C -S 4k base.qcow2 out
        fail 1 convert raw.img raw.img
        fail 1 convert -O qcow2 base.qcow2 base.qcow2
        fail 1 convert -O qcow2 top.qcow2 base.qcow2
        fail 1 convert -n -o size=1 base.qcow2 big.qcow2
        fail 1 convert --skip-broken-bitmaps -O qcow2 base.qcow2 out
        fail 1 convert -r abc base.qcow2 out
        fail 1 convert --target-image-opts base.qcow2 driver=qcow2,file.filename=big.qcow2
        fail 1 convert -O qcow2 -o preallocation=metadata -c base.qcow2 out
        usage convert
        usage convert base.qcow2
        usage convert -s x base.qcow2 out
        usage convert --image-opts -f raw driver=raw,file.filename=raw.img out
        same base.qcow2
        same raw.img
        "
    ));
}

#[test]
fn compare_is_called_by_vdsm() {
    check(&format!(
        "{FILLED}
        peer convert -O qcow2 raw.img same.qcow2
        peer convert -O raw top.qcow2 top.raw
        peer create -q other.img 4M
        io -f raw -c 'write -P 5 1M 1M' -c 'write -P 7 3500k 512' other.img
        run compare -f raw -F qcow2 raw.img same.qcow2
        run compare top.qcow2 top.raw
        ok compare -p top.qcow2 top.raw
        run compare -U top.qcow2 top.qcow2
        ok compare -q raw.img same.qcow2
        code 1 compare raw.img base.qcow2
        code 1 compare raw.img other.img
        code 1 compare -q raw.img other.img
        code 1 compare -s base.qcow2 top.qcow2
        fail 2 compare raw.img nope
        fail 2 compare -f qcow2 raw.img base.qcow2
        fail 2 compare -T foo raw.img base.qcow2
        "
    ));
}

#[test]
fn resize_is_called_by_nova_cinder_libvirt_and_proxmox() {
    check(&format!(
        "{FILLED}
        # nova, cinder
        run resize -f qcow2 base.qcow2 20971520
        same base.qcow2
        run resize -f raw raw.img 1G
        same raw.img
        # libvirt
        run resize --shrink base.qcow2 5242880
        same base.qcow2
        run resize top.qcow2 10486272
        same top.qcow2
        # Proxmox
        run resize --preallocation=metadata -f qcow2 base.qcow2 12582912
        same base.qcow2
        run resize -f raw --preallocation=falloc raw.img +64k
        same raw.img
        # people
        run resize base.qcow2 +10G
        same base.qcow2
        run resize --shrink base.qcow2 -1G
        same base.qcow2
        run resize -f raw --shrink raw.img 1.5M
        same raw.img
        run resize raw.img +0
        ok resize -q top.qcow2 +64k
        same top.qcow2
        fail 1 resize base.qcow2 5M
        fail 1 resize base.qcow2 0
        fail 1 resize base.qcow2 -100G
        fail 1 resize base.qcow2 abc
        fail 1 resize base.qcow2 9E
        fail 1 resize --shrink base.qcow2 1000
        fail 1 resize -f raw --preallocation=metadata raw.img +1M
        fail 1 resize -f raw --preallocation=foo raw.img +1M
        fail 1 resize -f raw --preallocation=full --shrink raw.img 1M
        fail 1 resize nope 1M
        usage resize base.qcow2
        same base.qcow2
        "
    ));
}

#[test]
fn check_repairs_as_qemu_img_does() {
    check(
        "
        peer create -q -f qcow2 a.qcow2 10M
        io -c 'write -P 1 0 1M' -c 'write -c -P 2 2M 64k' a.qcow2
        run check a.qcow2
        # the refcount of the L1 table becomes 0, that of a cluster behind the end 1
        copy a.qcow2 broken.qcow2
        poke broken.qcow2 131078 0000
        copy a.qcow2 leaking.qcow2
        grow leaking.qcow2 2097152
        poke leaking.qcow2 131132 0001
        code 2 check broken.qcow2
        code 3 check leaking.qcow2
        code 2 check --output=json broken.qcow2
        code 3 check --output=json leaking.qcow2
        copy leaking.qcow2 leaking2.qcow2
        code 0 check -r leaks leaking.qcow2
        same leaking.qcow2
        json check -r leaks --output=json leaking2.qcow2
        json check --output=json leaking2.qcow2
        code 0 check -r all broken.qcow2
        same broken.qcow2
        code 0 check -q -r all broken.qcow2
        ",
    );
}

#[test]
fn dd_is_called_by_proxmox_and_libguestfs() {
    check(&format!(
        "{FILLED}
        run dd -f qcow2 -O raw bs=64k if=top.qcow2 of=a.raw
        same a.raw
        run dd if=base.qcow2 of=head.raw bs=512 count=512
        same head.raw
        run dd -O qcow2 if=raw.img of=part.qcow2 bs=1M count=2 skip=1
        same part.qcow2
        run dd bs=100 count=7 skip=3 if=raw.img of=odd.raw
        same odd.raw
        fail 1 dd if=base.qcow2
        fail 1 dd bs=0 if=base.qcow2 of=x
        fail 1 dd bs=abc if=base.qcow2 of=x
        fail 1 dd count=-1 if=base.qcow2 of=x
        fail 1 dd foo=1 if=base.qcow2 of=x
        fail 1 dd if=nope of=x
        fail 1 dd if=base.qcow2 of=base.qcow2
        usage dd -n if=base.qcow2 of=x
        same base.qcow2
        "
    ));
}

#[test]
fn bench_measures_and_refuses() {
    check(&format!(
        "{FILLED}
        ok bench -c 100 base.qcow2
        ok bench -c 100 -w --pattern 5 --flush-interval 10 -d 4 -s 64k -S 128k -o 1M base.qcow2
        same base.qcow2
        ok bench -c 100 -t none -n -d 8 top.qcow2
        ok bench -c 100 -i io_uring -d 8 top.qcow2
        ok bench -c 40 -w -t none --pattern 6 -d 16 -s 5000 -S 40000 base.qcow2
        same base.qcow2
        ok bench -c 40 -w -i io_uring --pattern 7 -d 3 -s 64k -o 1M base.qcow2
        same base.qcow2
        ok bench -c 40 -w -t none -i threads --pattern 8 --flush-interval 8 -d 8 base.qcow2
        same base.qcow2
        peer create -q -f qcow2 -o cluster_size=4k new.qcow2 4M
        ok bench -c 2000 -w -t none --pattern 9 --flush-interval 100 --no-drain -d 16 new.qcow2
        same new.qcow2
        peer create -q -f vmdk new.vmdk 4M
        ok bench -c 900 -w -t none --pattern 9 -d 16 -f vmdk new.vmdk
        same new.vmdk
        fail 1 bench -c 0 base.qcow2
        fail 1 bench -c 10 -s 0 base.qcow2
        fail 1 bench -c 10 --flush-interval 10 base.qcow2
        fail 1 bench -c 10 -w --flush-interval 10 -d 64 base.qcow2
        fail 1 bench -c 10 --pattern 300 -w base.qcow2
        fail 1 bench -c 10 -i foo base.qcow2
        fail 1 bench -c 10 -n base.qcow2
        fail 1 bench -c abc base.qcow2
        code 1 bench -c 1 -o 5G base.qcow2
        "
    ));
}

#[test]
fn snapshots_are_copied_and_measured() {
    check(
        "
        peer create -q -f qcow2 base.qcow2 4M
        io -c 'write -P 9 3M 64k' base.qcow2
        peer create -q -f qcow2 -b base.qcow2 -F qcow2 disk.qcow2 10M
        io -c 'write -P 1 0 1M' disk.qcow2
        peer snapshot -c one disk.qcow2
        io -c 'write -P 2 512k 1M' -c 'write -z 3M 64k' disk.qcow2
        peer snapshot -c two disk.qcow2
        io -c 'write -P 3 9M 64k' disk.qcow2
        run convert -O raw -l snapshot.name=one disk.qcow2 one.raw
        same one.raw
        run convert -O qcow2 -l 2 disk.qcow2 two.qcow2
        same two.qcow2
        run convert -O raw -l snapshot.id=1 disk.qcow2 id.raw
        same id.raw
        run measure -O qcow2 -l one disk.qcow2
        run measure -O qcow2 disk.qcow2
        fail 1 convert -l snapshot.name=x disk.qcow2 out
        fail 1 convert -l x base.qcow2 out
        fail 1 measure -O qcow2 -l x disk.qcow2
        same disk.qcow2
        ",
    );
}

#[test]
fn amend_is_called_by_vdsm() {
    check(&format!(
        "{FILLED}
        run amend -f qcow2 -o compat=0.10 base.qcow2
        same base.qcow2
        run amend -o compat=1.1 base.qcow2
        same base.qcow2
        run amend -o lazy_refcounts=on base.qcow2
        same base.qcow2
        run amend -o compat=0.10 base.qcow2
        same base.qcow2
        run amend -o compat=1.1,refcount_bits=64 base.qcow2
        same base.qcow2
        ok amend -p -o refcount_bits=16 -o compat=v2 base.qcow2
        same base.qcow2
        run amend -o size=20M base.qcow2
        same base.qcow2
        run amend -o compat=0.10 top.qcow2
        same top.qcow2
        run amend -o compat=1.1 top.qcow2
        run amend -o size=30M top.qcow2
        same top.qcow2
        run amend -o compat=0.10 top.qcow2
        run amend -o backing_file=base.qcow2,backing_fmt=qcow2 top.qcow2
        run amend -f qcow2 -o help
        fail 1 amend -o lazy_refcounts=on top.qcow2
        fail 1 amend -o refcount_bits=64 top.qcow2
        fail 1 amend -o refcount_bits=7 top.qcow2
        fail 1 amend -o cluster_size=4k top.qcow2
        fail 1 amend -o foo=1 top.qcow2
        fail 1 amend -o backing_file=nope top.qcow2
        fail 1 amend -f raw -o compat=1.1 raw.img
        fail 1 amend -o compat=9 top.qcow2
        fail 1 amend -o data_file=x top.qcow2
        fail 1 amend -t foo -o compat=1.1 top.qcow2
        fail 1 amend -o compat=1.1 nope
        usage amend top.qcow2
        usage amend -o compat=1.1
        "
    ));
}

#[test]
fn bitmap_is_called_by_vdsm() {
    check(
        "
        peer create -q -f qcow2 a.qcow2 4M
        peer create -q -f qcow2 b.qcow2 4M
        peer create -q raw.img 1M
        run bitmap --add a.qcow2 b0
        io -c 'write 1M 100k' a.qcow2
        run bitmap --add -g 64k --disable a.qcow2 b1
        io -c 'write 3M 100k' a.qcow2
        ok info a.qcow2
        json info --output=json a.qcow2
        run bitmap --merge b0 a.qcow2 b1
        run bitmap --add --clear --enable a.qcow2 b7
        run bitmap --disable a.qcow2 b7
        run bitmap --add --merge b0 a.qcow2 b8
        run bitmap --add --merge b0 -b a.qcow2 -F qcow2 b.qcow2 from
        same a.qcow2
        same b.qcow2
        run measure -O qcow2 a.qcow2
        run measure -O raw a.qcow2
        run convert --bitmaps -O qcow2 a.qcow2 c.qcow2
        same c.qcow2
        run bitmap --remove a.qcow2 b0
        same a.qcow2
        fail 1 bitmap --add a.qcow2 b1
        fail 1 bitmap --add -g 1000 a.qcow2 b2
        fail 1 bitmap --add -g 4G a.qcow2 b2
        fail 1 bitmap --add a.qcow2 ''
        fail 1 bitmap --remove a.qcow2 nope
        fail 1 bitmap --enable a.qcow2 nope
        fail 1 bitmap --clear a.qcow2 nope
        fail 1 bitmap --merge b1 a.qcow2 nope
        fail 1 bitmap --merge nope a.qcow2 b1
        peer create -q -f qcow2 larger.qcow2 6M
        run bitmap --add larger.qcow2 b
        fail 1 bitmap --merge b -b larger.qcow2 -F qcow2 a.qcow2 b1
        fail 1 bitmap a.qcow2 b1
        fail 1 bitmap -g 4k --remove a.qcow2 b1
        fail 1 bitmap --add -b b.qcow2 a.qcow2 b2
        fail 1 bitmap --add nope b1
        fail 1 convert --bitmaps -O qcow2 raw.img x.qcow2
        fail 1 convert --bitmaps -O raw a.qcow2 x.raw
        fail 1 convert --bitmaps -O qcow2 a.qcow2 raw.img x.qcow2
        usage bitmap --add a.qcow2
        same a.qcow2
        ",
    );
}

#[test]
fn images_of_other_vendors_are_read_and_written() {
    check(&format!(
        "{FILLED}
        peer convert -O vmdk top.qcow2 a.vmdk
        peer convert -O vmdk -o subformat=streamOptimized top.qcow2 s.vmdk
        peer convert -O vmdk -o subformat=twoGbMaxExtentFlat top.qcow2 t.vmdk
        peer convert -O vdi top.qcow2 a.vdi
        peer convert -O vpc -o force_size=on top.qcow2 a.vpc
        peer convert -O vhdx top.qcow2 a.vhdx
        json info --output=json a.vmdk
        json info --output=json s.vmdk
        json info --output=json -f vmdk t.vmdk
        run info a.vdi
        run info a.vpc
        run info a.vhdx
        run check a.vmdk
        run check a.vdi
        run check a.vhdx
        json check --output=json a.vdi
        fail 63 check a.vpc
        fail 63 check -r all a.vdi
        fail 63 check -r leaks a.vmdk
        run map --output=json a.vmdk
        run map --output=json a.vdi
        run convert -O qcow2 a.vmdk vmdk.qcow2
        same vmdk.qcow2
        run convert -O raw s.vmdk stream.raw
        same stream.raw
        run convert -f vmdk -O raw t.vmdk split.raw
        same split.raw
        run convert -f vdi -O qcow2 a.vdi vdi.qcow2
        same vdi.qcow2
        run convert -f vpc -O raw a.vpc vpc.raw
        same vpc.raw
        run convert -f vhdx -O raw a.vhdx vhdx.raw
        same vhdx.raw
        # OVA tools, cinder, people
        run convert -f qcow2 -O vmdk -o subformat=streamOptimized top.qcow2 o1.vmdk
        same o1.vmdk
        ok convert -p -c -O vmdk -o subformat=streamOptimized,adapter_type=lsilogic top.qcow2 o2.vmdk
        same o2.vmdk
        run convert -O vmdk top.qcow2 o3.vmdk
        same o3.vmdk
        run convert -O vdi top.qcow2 o4.vdi
        same o4.vdi
        run convert -O vpc -o force_size=on top.qcow2 o5.vpc
        same o5.vpc
        run convert -O vhdx -o subformat=dynamic top.qcow2 o6.vhdx
        same o6.vhdx
        run compare a.vmdk a.vdi
        run compare -f vpc -F vhdx a.vpc a.vhdx
        "
    ));
}

#[test]
fn names_with_layers_are_called_by_virt_v2v_and_vdsm() {
    check(&format!(
        "{FILLED}
        copy raw.img tar.img
        grow tar.img 6291456
        peer create -q -f qcow2 -b base.qcow2 -F qcow2 inner.qcow2
        # virt-v2v asks whether this can be opened at all
        ok info 'json:{{\"file\":{{\"driver\":\"raw\",\"offset\":512,\"size\":512,\"file\":{{\"filename\":\"tar.img\"}}}}}}'
        json info --output=json 'json:{{\"driver\":\"qcow2\",\"file\":{{\"driver\":\"file\",\"filename\":\"top.qcow2\"}},\"backing\":null}}'
        run map --output=json 'json:{{\"driver\":\"raw\",\"offset\":1048576,\"size\":1048576,\"file\":{{\"filename\":\"tar.img\"}}}}'
        run convert -O raw 'json:{{\"driver\":\"raw\",\"offset\":1048576,\"size\":2097152,\"file\":{{\"filename\":\"tar.img\"}}}}' part.raw
        same part.raw
        # vdsm copies one layer of a chain
        run convert -O qcow2 'json:{{\"driver\":\"qcow2\",\"file\":{{\"driver\":\"file\",\"filename\":\"top.qcow2\"}},\"backing\":null}}' one.qcow2
        same one.qcow2
        run map --output=json 'json:{{\"driver\":\"qcow2\",\"file.filename\":\"top.qcow2\",\"backing\":null}}'
        run measure -O qcow2 'json:{{\"driver\":\"qcow2\",\"file.filename\":\"top.qcow2\",\"backing\":null}}'
        # a disk inside a disk
        run convert -O qcow2 inner.qcow2 inside.qcow2
        peer convert -O raw inside.qcow2 whole.raw
        run convert -n --target-image-opts inner.qcow2 driver=raw,file.driver=qcow2,file.file.filename=inside.qcow2
        same inside.qcow2
        run compare --image-opts driver=raw,file.driver=qcow2,file.file.filename=inside.qcow2 driver=raw,file.filename=whole.raw
        fail 1 info 'json:{{\"driver\":\"raw\",\"offset\":512,\"size\":1000,\"file\":{{\"filename\":\"raw.img\"}}}}'
        fail 1 info 'json:{{\"driver\":\"raw\",\"offset\":10000001,\"file\":{{\"filename\":\"raw.img\"}}}}'
        fail 1 info 'json:{{\"driver\":\"raw\",\"offset\":512,\"size\":9437184,\"file\":{{\"filename\":\"raw.img\"}}}}'
        fail 1 info 'json:{{\"driver\":\"raw\",\"offset\":-5,\"file\":{{\"filename\":\"raw.img\"}}}}'
        fail 1 info 'json:{{\"filename\":\"raw.img\"}}'
        fail 1 info 'json:'
        fail 1 info 'json:[]'
        "
    ));
}

#[test]
fn what_cannot_be_read_is_salvaged_around() {
    check(
        "
        peer create -q -f qcow2 a.qcow2 1M
        io -c 'write -P 1 0 64k' -c 'write -c -P 2 128k 64k' -c 'write -P 3 256k 64k' -c 'write -z 512k 64k' a.qcow2
        # the compressed data, behind the clusters before it
        poke a.qcow2 393216 ffffffffffffffff
        code 1 convert -O raw a.qcow2 out.raw
        ok convert --salvage -O raw a.qcow2 out.raw
        same out.raw
        ok convert --salvage -c -O qcow2 a.qcow2 out.qcow2
        same out.qcow2
        fail 1 convert --salvage -C -O raw a.qcow2 x.raw
        ",
    );
}

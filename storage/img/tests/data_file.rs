//! qcow2 with external data files, in twin directories: what is created, said, mapped and left in both files.

mod support;

use support::{Twins, check};

#[test]
fn data_files_are_created_and_told_of() {
    check(
        "
        run create -f qcow2 -o data_file=d.raw a.qcow2 1M
        run create -f qcow2 -o data_file=e.raw,data_file_raw=on b.qcow2 1M
        run create -f qcow2 -o data_file=f.raw,cluster_size=4k,extended_l2=off,preallocation=metadata c.qcow2 3M
        run create -f qcow2 -o data_file=g.raw,preallocation=full,extended_l2=on,cluster_size=32k d.qcow2 1M
        json info --output=json a.qcow2
        json info --output=json b.qcow2
        json info --output=json d.qcow2
        same d.raw
        same g.raw
        ok info a.qcow2
        json check --output=json -f qcow2 a.qcow2
        json check --output=json -f qcow2 b.qcow2
        json check --output=json -f qcow2 d.qcow2
        json map --output=json -f qcow2 a.qcow2
        json map --output=json -f qcow2 b.qcow2
        json map --output=json -f qcow2 c.qcow2
        json map --output=json -f qcow2 d.qcow2
        run measure -O qcow2 -f qcow2 b.qcow2
        run measure -O qcow2 -o data_file=x --size 1M
        fail 1 create -q -f qcow2 -o data_file=x,compat=0.10 n.qcow2 1M
        fail 1 create -q -f qcow2 -o data_file_raw=on n.qcow2 1M
        fail 1 create -q -f qcow2 -o data_file=x,data_file_raw=on,backing_file=a.qcow2,backing_fmt=qcow2 n.qcow2
        fail 1 create -q -f qcow2 -o data_file=no/where n.qcow2 1M
        ",
    );
}

#[test]
fn data_goes_through_both_tools() {
    let twins = Twins::new();
    twins.run(
        "
        run create -f qcow2 -o data_file=d.raw,data_file_raw=on a.qcow2 1M
        run create -f qcow2 -o data_file=e.raw b.qcow2 1M
        run create -f raw src.raw 1M
        io -f raw -c 'write -q -P 1 0 100k' -c 'write -q -P 2 300k 150k' src.raw
        run convert -n -f raw -O qcow2 src.raw a.qcow2
        fail 1 rebase -u -f qcow2 -b src.raw -F raw a.qcow2
        fail 1 rebase -f qcow2 -b src.raw -F raw a.qcow2
        same a.qcow2
        run rebase -u -f qcow2 -b src.raw -F raw b.qcow2
        run rebase -u -f qcow2 -b '' b.qcow2
        run convert -f raw -O qcow2 -o data_file=z.raw,data_file_raw=on src.raw z.qcow2
        run convert -f raw -O qcow2 -o data_file=y.raw src.raw y.qcow2
        run compare -f raw -F qcow2 src.raw z.qcow2
        run compare -f raw -F qcow2 src.raw y.qcow2
        run compare -f raw -F raw src.raw z.raw
        run compare -f raw -F raw src.raw d.raw
        same z.raw
        same y.qcow2
        io -f qcow2 -c 'write -q -P 3 0 64k' -c 'write -q -P 4 256k 4k' -c 'write -q -z 640k 64k' b.qcow2
        run map -f qcow2 b.qcow2
        json map --output=json -f qcow2 b.qcow2
        run map -f qcow2 z.qcow2
        run check -f qcow2 b.qcow2
        run convert -f qcow2 -O raw b.qcow2 out.raw
        same out.raw
        run convert -f qcow2 -O qcow2 b.qcow2 out.qcow2
        same out.qcow2
        run resize -f qcow2 b.qcow2 2M
        run resize -f qcow2 z.qcow2 3M
        json map --output=json -f qcow2 z.qcow2
        same z.raw
        same b.qcow2
        run resize -f qcow2 --shrink z.qcow2 384k
        same z.qcow2
        same z.raw
        run resize -f qcow2 --preallocation=metadata z.qcow2 4M
        same z.qcow2
        same z.raw
        run create -f qcow2 -b out.qcow2 -F qcow2 -o data_file=o.raw o.qcow2
        io -f qcow2 -c 'write -q -P 7 0 4k' o.qcow2
        run compare -f qcow2 -F qcow2 o.qcow2 o.qcow2
        run commit -f qcow2 o.qcow2
        same out.qcow2
        run rebase -f qcow2 -b '' o.qcow2
        same o.qcow2
        fail 1 snapshot -c s a.qcow2
        fail 1 snapshot -a s a.qcow2
        fail 1 snapshot -d s a.qcow2
        run snapshot -l a.qcow2
        run bitmap --add -f qcow2 a.qcow2 bits
        json info --output=json a.qcow2
        fail 1 amend -f qcow2 -o compat=0.10 a.qcow2
        fail 1 amend -f qcow2 -o data_file_raw=on b.qcow2
        run amend -f qcow2 -o lazy_refcounts=on a.qcow2
        run amend -f qcow2 -o data_file_raw=off a.qcow2
        run amend -f qcow2 -o data_file=./d.raw a.qcow2
        json info --output=json a.qcow2
        code 1 convert -c -f raw -O qcow2 -o data_file=q.raw src.raw q.qcow2
        run amend -f qcow2 -o data_file=nothere.raw b.qcow2
        fail 1 map -f qcow2 b.qcow2
        ok map --image-opts driver=qcow2,file.filename=b.qcow2,data-file.filename=e.raw
        run compare --image-opts driver=raw,file.filename=e.raw driver=qcow2,file.filename=b.qcow2,data-file.filename=e.raw
        json info --output=json b.qcow2
        run amend -f qcow2 -o data_file= a.qcow2
        fail 1 map -f qcow2 a.qcow2
        ",
    );
}

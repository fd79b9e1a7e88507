//! Images whose data is in files beside them, and what `map` says of formats that have a place for every byte, in twin
//! directories.

mod support;

use support::check;

#[test]
fn vmdks_of_several_files_are_created_converted_and_mapped() {
    check(
        "
        run create -f vmdk -o subformat=monolithicFlat flat.vmdk 5M
        run create -f vmdk -o subformat=twoGbMaxExtentFlat,adapter_type=lsilogic split.a.vmdk 2200M
        run create -f vmdk -o subformat=twoGbMaxExtentSparse,zeroed_grain=on grow.vmdk 2200M
        run create -f vmdk -o subformat=twoGbMaxExtentSparse two.vmdk 4G
        run create -f vmdk -o subformat=monolithicFlat,hwversion=7,toolsversion=5 noext 1000
        same flat.vmdk
        same split.a.vmdk
        same grow.vmdk
        same two.vmdk
        same noext
        json info --output=json -f vmdk flat.vmdk
        json info --output=json -f vmdk split.a.vmdk
        json info --output=json -f vmdk grow.vmdk
        json info --output=json -f vmdk noext
        run check -f vmdk grow.vmdk
        fail 1 create -f vmdk -o subformat=monolithicFlat,zeroed_grain=on x.vmdk 1M
        fail 1 create -f vmdk -o subformat=twoGbMaxExtentFlat -b flat.vmdk -F vmdk x.vmdk 5M
        # QEMU writes the first block of a new file, to learn of its alignment: holes are compared in the same files.
        peer create -q -f vmdk -o subformat=monolithicFlat flat.vmdk 5M
        peer create -q -f vmdk -o subformat=twoGbMaxExtentFlat,adapter_type=lsilogic split.a.vmdk 2200M
        io -f vmdk -c 'write -q -P 1 1M 64k' flat.vmdk
        io -f vmdk -c 'write -q -P 1 1M 64k' -c 'write -q -P 2 2030M 40M' -c 'write -q -P 3 2100M 1M' grow.vmdk
        io -f vmdk -c 'write -q -P 1 1M 64k' -c 'write -q -P 2 2047M 2M' -c 'write -q -P 3 2100M 1M' split.a.vmdk
        run map -f vmdk flat.vmdk
        run map -f vmdk split.a.vmdk
        run map -f vmdk grow.vmdk
        json map --output=json -f vmdk flat.vmdk
        json map --output=json -f vmdk split.a.vmdk
        json map --output=json -f vmdk grow.vmdk
        run convert -f vmdk -O vmdk -o subformat=twoGbMaxExtentSparse split.a.vmdk s.vmdk
        run convert -f vmdk -O vmdk -o subformat=twoGbMaxExtentFlat grow.vmdk f.vmdk
        run convert -f vmdk -O vmdk -o subformat=monolithicFlat grow.vmdk m.vmdk
        run convert -f vmdk -O qcow2 grow.vmdk q.qcow2
        same s.vmdk
        same f.vmdk
        same m.vmdk
        same q.qcow2
        run compare -f vmdk -F vmdk s.vmdk split.a.vmdk
        run compare -f vmdk -F vmdk m.vmdk f.vmdk
        run check -f vmdk s.vmdk
        ",
    );
}

#[test]
fn places_that_are_holes_are_mapped_as_qemu_maps_them() {
    check(
        "
        peer create -q -f vpc -o subformat=fixed,force_size=on f.vpc 4M
        io -f vpc -c 'write -q -P 1 1M 64k' f.vpc
        run map -f vpc f.vpc
        json map --output=json -f vpc f.vpc
        peer create -q -f vdi -o static=on s.vdi 4M
        io -f vdi -c 'write -q -P 1 1M 64k' s.vdi
        json map --output=json -f vdi s.vdi
        peer create -q -f raw r.raw 4M
        io -f raw -c 'write -q -P 1 1M 64k' r.raw
        json map --output=json -f raw r.raw
        ",
    );
}

#[test]
fn a_smaller_image_is_a_shorter_file() {
    check(
        "
        run create -f raw r.raw 4M
        run resize -f raw --shrink r.raw 1000448
        run create -f qcow2 q.qcow2 16M
        io -c 'write -q -P 1 0 16M' q.qcow2
        run resize --shrink q.qcow2 2M
        json info --output=json q.qcow2
        same q.qcow2
        same r.raw
        ",
    );
}

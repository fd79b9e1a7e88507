//! Shapes that many calls share: references to objects and typed parameters.

use crate::xdr::{Decoder, XStr, Xdr, XdrError, xdr_struct};

/// Most objects of one kind in one listing (domains, networks, pools, volumes, snapshots, interfaces, secrets, filters).
pub const OBJECT_LIST_MAX: usize = 16384;
/// Most node devices in one listing.
pub const NODE_DEVICE_LIST_MAX: usize = 65536;
/// Most typed parameters of the calls with a small set.
pub const PARAMS_MAX: usize = 64;
/// Most typed parameters in one domain's statistics record.
pub const STATS_PARAMS_MAX: usize = 262_144;
/// Most bytes of one CPU bitmap.
pub const CPUMAP_MAX: usize = 2048;
/// Most bytes of a set of CPU bitmaps.
pub const CPUMAPS_MAX: usize = 8 << 20;

xdr_struct! {
    /// A domain by value. `id` is -1 when inactive; the uuid identifies, the name may be stale.
    pub struct DomainRef { name: XStr, uuid: [u8; 16], id: i32 }
    /// A network by value.
    pub struct NetworkRef { name: XStr, uuid: [u8; 16] }
    /// A network filter by value.
    pub struct NwfilterRef { name: XStr, uuid: [u8; 16] }
    /// A binding of a filter to a port device.
    pub struct NwfilterBindingRef { portdev: XStr, filtername: XStr }
    /// A network port by value.
    pub struct NetworkPortRef { net: NetworkRef, uuid: [u8; 16] }
    /// A host interface by value.
    pub struct InterfaceRef { name: XStr, mac: XStr }
    /// A storage pool by value.
    pub struct StoragePoolRef { name: XStr, uuid: [u8; 16] }
    /// A storage volume by value.
    pub struct StorageVolRef { pool: XStr, name: XStr, key: XStr }
    /// A node device by value.
    pub struct NodeDeviceRef { name: XStr }
    /// A secret by value.
    pub struct SecretRef { uuid: [u8; 16], usage_type: i32, usage_id: XStr }
    /// A snapshot by value.
    pub struct SnapshotRef { name: XStr, dom: DomainRef }
    /// A checkpoint by value.
    pub struct CheckpointRef { name: XStr, dom: DomainRef }
    /// A named number, as node statistics use it.
    pub struct NodeStat { field: XStr, value: u64 }
    /// A named value of one of seven types.
    pub struct TypedParam { field: XStr, value: ParamValue }
}

impl TypedParam {
    /// A parameter called `field`.
    pub fn new(field: impl Into<XStr>, value: ParamValue) -> TypedParam {
        TypedParam { field: field.into(), value }
    }
}

/// Value of a typed parameter; the discriminator is the order here, from 1.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the protocol's own names
pub enum ParamValue {
    Int(i32),
    Uint(u32),
    Llong(i64),
    Ullong(u64),
    Double(f64),
    Boolean(bool),
    String(XStr),
}

impl Xdr for ParamValue {
    const MIN_BYTES: usize = 8;
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            ParamValue::Int(value) => (1i32, *value).encode(out),
            ParamValue::Uint(value) => (2i32, *value).encode(out),
            ParamValue::Llong(value) => (3i32, *value).encode(out),
            ParamValue::Ullong(value) => (4i32, *value).encode(out),
            ParamValue::Double(value) => (5i32, *value).encode(out),
            ParamValue::Boolean(value) => (6i32, i32::from(*value)).encode(out),
            ParamValue::String(value) => {
                7i32.encode(out);
                value.encode(out);
            }
        }
    }
    fn decode(input: &mut Decoder<'_>) -> Result<Self, XdrError> {
        Ok(match i32::decode(input)? {
            1 => ParamValue::Int(Xdr::decode(input)?),
            2 => ParamValue::Uint(Xdr::decode(input)?),
            3 => ParamValue::Llong(Xdr::decode(input)?),
            4 => ParamValue::Ullong(Xdr::decode(input)?),
            5 => ParamValue::Double(Xdr::decode(input)?),
            6 => ParamValue::Boolean(i32::decode(input)? != 0),
            7 => ParamValue::String(Xdr::decode(input)?),
            found => return Err(XdrError::UnknownArm { what: "typed parameter", found }),
        })
    }
}

impl<A: Xdr, B: Xdr> Xdr for (A, B) {
    const MIN_BYTES: usize = A::MIN_BYTES + B::MIN_BYTES;
    fn encode(&self, out: &mut Vec<u8>) {
        self.0.encode(out);
        self.1.encode(out);
    }
    fn decode(input: &mut Decoder<'_>) -> Result<Self, XdrError> {
        Ok((A::decode(input)?, B::decode(input)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xdr::{from_bytes, to_bytes};

    #[test]
    fn typed_parameters_carry_their_type_as_a_number_from_one() {
        for (value, discriminator, bytes) in [
            (ParamValue::Int(-1), 1, 4),
            (ParamValue::Uint(1), 2, 4),
            (ParamValue::Llong(-1), 3, 8),
            (ParamValue::Ullong(1), 4, 8),
            (ParamValue::Double(0.5), 5, 8),
            (ParamValue::Boolean(true), 6, 4),
            (ParamValue::String("abc".into()), 7, 8),
        ] {
            let param = TypedParam::new("f", value);
            let encoded = to_bytes(&param);
            assert_eq!(encoded[8..12], [0, 0, 0, discriminator], "{param:?}");
            assert_eq!(encoded.len(), 12 + bytes, "{param:?}");
            assert_eq!(from_bytes::<TypedParam>(&encoded), Ok(param));
        }
        assert_eq!(
            from_bytes::<ParamValue>(&[0, 0, 0, 8, 0, 0, 0, 0]),
            Err(XdrError::UnknownArm { what: "typed parameter", found: 8 })
        );
    }
}

//! ACPI tables of the board. Numbers of chapters are those of the ACPI specification 6.5.

use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, aml};
use chipset::hpet::HPET_HZ;
use chipset::pm::SLP_TYP_S5;
use chipset::reset::{RESET_CONTROL, RESET_VALUE};
use pci::host_bridge::{ECAM_BASE, ECAM_BYTES};
use pci::lpc::PM_BASE;

use crate::board::SERIAL_PORTS;
use crate::layout;

const OEM: [u8; 6] = *b"VIREO ";
const OEM_TABLE: [u8; 8] = *b"Q35-1   ";

/// What the tables depend on.
#[derive(Clone, Debug)]
pub(crate) struct AcpiConfig {
    pub(crate) vcpus: u32,
    /// Which of the four serial ports exist.
    pub(crate) serial: [bool; 4],
    /// Window for 64-bit BARs: first and last address; `None` where physical addresses end too early.
    pub(crate) high_window: Option<(u64, u64)>,
}

/// The tables as one block for `base` (16-byte aligned), RSDP first.
pub(crate) fn tables(config: &AcpiConfig, base: u64) -> Vec<u8> {
    let mut block = vec![0u8; Rsdp::len().next_multiple_of(64)];
    let mut place = |table: &[u8]| {
        let at = base + block.len() as u64;
        block.extend_from_slice(table);
        block.resize(block.len().next_multiple_of(64), 0);
        at
    };
    let facs = place(&facs());
    let dsdt = place(&dsdt(config));
    let entries = [
        place(fadt(facs, dsdt).as_slice()),
        place(madt(config).as_slice()),
        place(mcfg().as_slice()),
        place(hpet().as_slice()),
        place(waet().as_slice()),
    ];
    let mut xsdt = table(*b"XSDT", 36, 1);
    entries.iter().for_each(|entry| xsdt.append_slice(&entry.to_le_bytes()));
    let xsdt = place(xsdt.as_slice());
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    block[..rsdp.len()].copy_from_slice(&rsdp);
    block
}

fn table(signature: [u8; 4], bytes: u32, revision: u8) -> Sdt {
    Sdt::new(signature, bytes, revision, OEM, OEM_TABLE, 1)
}

/// Firmware ACPI control structure; it has no checksum. 5.2.10
fn facs() -> [u8; 64] {
    let mut facs = [0; 64];
    facs[0..4].copy_from_slice(b"FACS");
    facs[4..8].copy_from_slice(&64u32.to_le_bytes());
    facs[32] = 2; // version
    facs
}

/// A generic address in port space. 5.2.3.2
fn port_address(port: u16, bits: u8, access: u8) -> [u8; 12] {
    let mut gas = [0; 12];
    gas[0..4].copy_from_slice(&[1, bits, 0, access]);
    gas[4..6].copy_from_slice(&port.to_le_bytes());
    gas
}

/// Fixed ACPI description table. 5.2.9
fn fadt(facs: u64, dsdt: u64) -> Sdt {
    /// WBINVD works, C1 works, the power button is in PM1 (bit 4 clear), there is no sleep button and no RTC wake, the
    /// timer has 32 bits, there is a reset register.
    const FLAGS: u32 = 1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 10;
    let mut t = table(*b"FACP", 276, 6);
    t.write_u32(36, facs as u32);
    t.write_u32(40, dsdt as u32);
    t.write_u16(46, 9); // SCI
    for (offset, register) in [(56, 0x00u16), (64, 0x04), (76, 0x08), (80, 0x20)] {
        t.write_u32(offset, (PM_BASE + register).into());
    }
    t.write_bytes(88, &[4, 2, 0, 4, 16]); // lengths of PM1 event, PM1 control, PM2, timer, GPE0
    t.write_u16(96, 0xfff); // C2 and C3 are not supported: latencies above their limits
    t.write_u16(98, 0xfff);
    t.write_u8(108, chipset::rtc::CENTURY as u8);
    t.write_u16(109, 1 << 2 | 1 << 1 | 1); // no VGA; the 8042 and ISA devices are there
    t.write_u32(112, FLAGS);
    t.write_bytes(116, &port_address(RESET_CONTROL, 8, 1));
    t.write_u8(128, RESET_VALUE);
    t.write_u64(140, dsdt);
    t.write_bytes(148, &port_address(PM_BASE, 32, 2));
    t.write_bytes(172, &port_address(PM_BASE + 4, 16, 2));
    t.write_bytes(208, &port_address(PM_BASE + 8, 32, 3));
    t.write_bytes(220, &port_address(PM_BASE + 0x20, 128, 1));
    t
}

/// Multiple APIC description table. 5.2.12
fn madt(config: &AcpiConfig) -> Sdt {
    let mut t = table(*b"APIC", 44, 5);
    t.write_u32(36, layout::LAPIC as u32);
    t.write_u32(40, 1); // the 8259 pair is there too
    for id in 0..config.vcpus {
        match u8::try_from(id) {
            Ok(id) if id < 255 => t.append_slice(&[0, 8, id, id, 1, 0, 0, 0]),
            _ => {
                // Local x2APIC. 5.2.12.12
                t.append_slice(&[9, 16, 0, 0]);
                [id, 1, id].iter().for_each(|word| t.append_slice(&word.to_le_bytes()));
            }
        }
    }
    t.append_slice(&[1, 12, 0, 0]);
    t.append_slice(&(layout::IOAPIC as u32).to_le_bytes());
    t.append_slice(&0u32.to_le_bytes());
    // The timer is on pin 2; SCI is level-triggered, active high. 5.2.12.5
    t.append_slice(&[2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
    t.append_slice(&[2, 10, 0, 9, 9, 0, 0, 0, 0xd, 0]);
    t.append_slice(&[4, 6, 0xff, 0, 0, 1]); // NMI on LINT1 of every processor
    t
}

/// The highest bus number there is. The window decodes 256 buses for firmware, but Linux looks for devices on every bus
/// that the table names, at two exits a slot.
const LAST_BUS: u8 = 0;

/// Where the ECAM is. PCI Firmware specification 3.3, 4.1.2
fn mcfg() -> Sdt {
    let mut t = table(*b"MCFG", 44, 1);
    t.append_slice(&ECAM_BASE.to_le_bytes());
    t.append_slice(&[0, 0, 0, LAST_BUS, 0, 0, 0, 0]); // segment 0, buses 0 to LAST_BUS
    t
}

/// HPET specification 1.0a, 3.2.4
fn hpet() -> Sdt {
    let mut t = table(*b"HPET", 56, 1);
    t.write_u32(36, 0x8086_a201);
    t.write_bytes(40, &[0, 64, 0, 0]);
    t.write_u64(44, layout::HPET);
    t.write_u16(53, (HPET_HZ / 1_000_000) as u16); // least tick count for a periodic interrupt: a microsecond
    t
}

/// Windows ACPI emulated devices table: the RTC needs no acknowledgement twice, the PM timer reads right at once.
fn waet() -> Sdt {
    let mut t = table(*b"WAET", 40, 1);
    t.write_u32(36, 2);
    t
}

/// An interrupt as ISA devices name it, edge-triggered and active high. 6.4.2.1
struct IsaIrq(u8);
impl Aml for IsaIrq {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.byte(0x22);
        sink.word(1 << (self.0 & 15));
    }
}

fn dsdt(config: &AcpiConfig) -> Vec<u8> {
    let mut code = Vec::new();
    pci_root(config, &mut code);
    let sleep = aml::Package::new(vec![&SLP_TYP_S5, &aml::ZERO, &aml::ZERO, &aml::ZERO]);
    aml::Name::new("_S5_".into(), &sleep).to_aml_bytes(&mut code);
    let mut t = table(*b"DSDT", 36, 2);
    t.append_slice(&code);
    t.as_slice().to_vec()
}

fn pci_root(config: &AcpiConfig, code: &mut Vec<u8>) {
    use aml::AddressSpaceCacheable::{Cacheable, NotCacheable};
    let buses = aml::AddressSpace::new_bus_number(0u16, LAST_BUS.into());
    let config_ports = aml::IO::new(0xcf8, 0xcf8, 1, 8);
    let low_ports = aml::AddressSpace::new_io(0u16, 0xcf7, None);
    let high_ports = aml::AddressSpace::new_io(0xd00u16, 0xffff, None);
    let (start, end) = layout::PCI_MEMORY;
    let memory = aml::AddressSpace::new_memory(NotCacheable, true, start as u32, end as u32 - 1, None);
    let (high_start, high_end) = config.high_window.unwrap_or_default();
    let high = aml::AddressSpace::new_memory(Cacheable, true, high_start, high_end, None);
    let mut resources: Vec<&dyn Aml> = vec![&buses, &config_ports, &low_ports, &high_ports, &memory];
    if config.high_window.is_some() {
        resources.push(&high);
    }
    let resources = aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(resources));
    let express = aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0A08"));
    let conventional = aml::Name::new("_CID".into(), &aml::EISAName::new("PNP0A03"));
    let segment = aml::Name::new("_SEG".into(), &aml::ZERO);
    let unique = aml::Name::new("_UID".into(), &aml::ZERO);
    let bus = aml::Name::new("_BBN".into(), &aml::ZERO);
    let routes = RouteTable;
    let isa = IsaBridge(config);
    let root: Vec<&dyn Aml> =
        vec![&express, &conventional, &segment, &unique, &bus, &resources, &routes, &isa, &Reserved];
    let root = aml::Device::new("PCI0".into(), root);
    aml::Scope::new("_SB_".into(), vec![&root, &HpetDevice]).to_aml_bytes(code);
}

/// Interrupt routing of every device and pin, straight to the IOAPIC. 6.2.13
struct RouteTable;
impl Aml for RouteTable {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let entries: Vec<[u32; 3]> = (0..32u8)
            .flat_map(|device| (0..4u8).map(move |pin| (device, pin)))
            .map(|(device, pin)| [u32::from(device) << 16 | 0xffff, pin.into(), pci::gsi(device, pin).into()])
            .collect();
        let packages: Vec<aml::Package<'_>> =
            entries.iter().map(|[address, pin, gsi]| aml::Package::new(vec![address, pin, &aml::ZERO, gsi])).collect();
        let mut list = aml::PackageBuilder::new();
        packages.iter().for_each(|package| list.add_element(package));
        aml::Name::new("_PRT".into(), &list).to_aml_bytes(sink);
    }
}

/// The ECAM, as a motherboard resource: without it Linux does not use MCFG.
struct Reserved;
impl Aml for Reserved {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let id = aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0C02"));
        let ecam = aml::Memory32Fixed::new(true, ECAM_BASE as u32, ECAM_BYTES as u32);
        let pm = aml::IO::new(PM_BASE, PM_BASE, 1, 0x80);
        let resources = aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&ecam, &pm]));
        aml::Device::new("MRES".into(), vec![&id, &resources]).to_aml_bytes(sink);
    }
}

/// Devices behind the LPC bridge.
struct IsaBridge<'a>(&'a AcpiConfig);
impl Aml for IsaBridge<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let address = aml::Name::new("_ADR".into(), &0x001f_0000u32);
        let rtc = IsaDevice { name: "RTC_", id: "PNP0B00", uid: None, ports: &[(0x70, 2)], irqs: &[8] };
        let keyboard = IsaDevice { name: "KBD_", id: "PNP0303", uid: None, ports: &[(0x60, 1), (0x64, 1)], irqs: &[1] };
        let mouse = IsaDevice { name: "MOU_", id: "PNP0F13", uid: None, ports: &[], irqs: &[12] };
        let ports = SERIAL_PORTS.map(|(port, _)| [(port, 8)]);
        let irqs = SERIAL_PORTS.map(|(_, irq)| [irq]);
        let names = ["COM1", "COM2", "COM3", "COM4"];
        let serial: Vec<IsaDevice<'_>> = (0..4)
            .filter(|&i| self.0.serial[i])
            .map(|i| IsaDevice {
                name: names[i],
                id: "PNP0501",
                uid: Some(i as u8 + 1),
                ports: &ports[i],
                irqs: &irqs[i],
            })
            .collect();
        let mut children: Vec<&dyn Aml> = vec![&address, &rtc, &keyboard, &mouse];
        children.extend(serial.iter().map(|port| port as &dyn Aml));
        aml::Device::new("ISA_".into(), children).to_aml_bytes(sink);
    }
}

struct IsaDevice<'a> {
    name: &'a str,
    id: &'a str,
    uid: Option<u8>,
    ports: &'a [(u16, u8)],
    irqs: &'a [u8],
}
impl Aml for IsaDevice<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let id = aml::Name::new("_HID".into(), &aml::EISAName::new(self.id));
        let uid = aml::Name::new("_UID".into(), &self.uid.unwrap_or(0));
        let status = aml::Name::new("_STA".into(), &0xfu8);
        let ports: Vec<aml::IO> = self.ports.iter().map(|&(port, count)| aml::IO::new(port, port, 1, count)).collect();
        let irqs: Vec<IsaIrq> = self.irqs.iter().map(|&irq| IsaIrq(irq)).collect();
        let mut resources: Vec<&dyn Aml> = ports.iter().map(|p| p as &dyn Aml).collect();
        resources.extend(irqs.iter().map(|i| i as &dyn Aml));
        let resources = aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(resources));
        let mut children: Vec<&dyn Aml> = vec![&id, &status, &resources];
        if self.uid.is_some() {
            children.insert(1, &uid);
        }
        aml::Device::new(self.name.into(), children).to_aml_bytes(sink);
    }
}

struct HpetDevice;
impl Aml for HpetDevice {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let id = aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0103"));
        let uid = aml::Name::new("_UID".into(), &aml::ZERO);
        let registers = aml::Memory32Fixed::new(true, layout::HPET as u32, 0x400);
        let resources = aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&registers]));
        aml::Device::new("HPET".into(), vec![&id, &uid, &resources]).to_aml_bytes(sink);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block() -> (Vec<u8>, u64) {
        let config =
            AcpiConfig { vcpus: 2, serial: [true, false, false, false], high_window: Some((1 << 36, (1 << 37) - 1)) };
        (tables(&config, 0xe_0000), 0xe_0000)
    }
    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }
    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }
    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, &b| sum.wrapping_add(b))
    }

    #[test]
    fn every_table_is_reachable_from_the_rsdp_and_adds_up() {
        let (block, base) = block();
        assert_eq!((&block[0..8], sum(&block[0..20]), sum(&block[0..36])), (&b"RSD PTR "[..], 0, 0));
        let table = |at: u64| {
            let start = (at - base) as usize;
            &block[start..start + u32_at(&block, start + 4) as usize]
        };
        let xsdt = table(u64_at(&block, 24));
        let entries: Vec<&[u8]> =
            xsdt[36..].chunks(8).map(|e| table(u64::from_le_bytes(e.try_into().unwrap()))).collect();
        let names: Vec<&[u8]> = entries.iter().map(|t| &t[..4]).collect();
        assert_eq!(names, [b"FACP", b"APIC", b"MCFG", b"HPET", b"WAET"]);
        let (facs, dsdt) = (table(u32_at(entries[0], 36).into()), table(u64_at(entries[0], 140)));
        assert_eq!((&facs[..4], &dsdt[..4]), (&b"FACS"[..], &b"DSDT"[..]));
        assert_eq!(
            (u64::from(u32_at(entries[0], 36)) % 64, u32_at(entries[0], 40) as u64),
            (0, u64_at(entries[0], 140))
        );
        for table in entries.into_iter().chain([xsdt, dsdt]) {
            assert_eq!(sum(table), 0, "{}", String::from_utf8_lossy(&table[..4]));
        }
    }

    #[test]
    fn the_tables_fit_below_the_bios() {
        assert!(block().0.len() < 0x1_0000);
    }
}

//! Linear to physical: page walks, the TLB, and loads and stores on top of them. SDM 3A chapter 4 "Paging".

use guest_ram::{Gpa, MARK_CODE, PAGE_BYTES};

use crate::alu::Word;
use crate::cpu::{Cpu, Flow, Io, Op, STACK_SEG, Stop, addr, attention, cr};
use crate::hostmem::{self, HostPtr};

const PAGE_MASK: u64 = !(PAGE_BYTES - 1);
/// Never equal to a page address.
const NO_PAGE: u64 = 1;
const SET_ENTRIES: usize = 1024;

/// What an access wants. [`Access::Sys`]: descriptor tables and task state, always with supervisor rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    pub write: bool,
    pub exec: bool,
    pub set: usize,
}

/// TLB sets: rights are part of the translation, so a change of privilege or of EFLAGS.AC picks another set.
pub(crate) const KERNEL: usize = 0;
pub(crate) const USER: usize = 1;
/// Supervisor with SMAP lifted (EFLAGS.AC set).
pub(crate) const KERNEL_AC: usize = 2;
/// Ring 3 with alignment checking (CR0.AM, EFLAGS.AC): never filled, so that every access is looked at.
pub(crate) const USER_ALIGNED: usize = 3;

#[derive(Clone, Copy)]
struct Entry {
    /// Page address if reads may go straight to memory.
    read: u64,
    /// Page address if writes may.
    write: u64,
    /// Host address = guest linear address + this.
    addend: u64,
    /// log2 of the mapping's size in bits 5:0; bit 6: global.
    meta: u64,
}
const EMPTY: Entry = Entry { read: NO_PAGE, write: NO_PAGE, addend: 0, meta: 0 };
const GLOBAL: u64 = 1 << 6;

/// A translation for instruction fetch.
#[derive(Clone, Copy)]
struct FetchEntry {
    page: u64,
    gpa: u64,
    meta: u64,
}
const NO_FETCH: FetchEntry = FetchEntry { page: NO_PAGE, gpa: 0, meta: 0 };

/// All translations of one vCPU.
pub(crate) struct Tlb {
    entries: Box<[Entry; 4 * SET_ENTRIES]>,
    fetch: Box<[FetchEntry; 512]>,
    base: usize,
    set: usize,
    /// Entries that a change of address space drops.
    local: Vec<u16>,
    /// Changes whenever any translation may have become stale.
    pub epoch: u64,
}

#[inline(always)]
fn slot(va: u64) -> usize {
    ((va >> 12) ^ (va >> 22)) as usize & (SET_ENTRIES - 1)
}

impl Tlb {
    pub fn new() -> Tlb {
        Tlb {
            entries: Box::new([EMPTY; 4 * SET_ENTRIES]),
            fetch: Box::new([NO_FETCH; 512]),
            base: 0,
            set: KERNEL,
            local: Vec::new(),
            epoch: 1,
        }
    }

    /// Chooses the set for accesses of the current privilege.
    pub fn select(&mut self, user: bool, smap_lifted: bool, aligned: bool) {
        self.set = if user && aligned {
            USER_ALIGNED
        } else if user {
            USER
        } else if smap_lifted {
            KERNEL_AC
        } else {
            KERNEL
        };
        self.base = self.set * SET_ENTRIES;
    }

    #[inline(always)]
    fn entry(&self, va: u64) -> &Entry {
        &self.entries[(self.base | slot(va)) & (4 * SET_ENTRIES - 1)]
    }

    /// Drops everything.
    pub fn flush_all(&mut self) {
        self.entries.fill(EMPTY);
        self.fetch.fill(NO_FETCH);
        self.local.clear();
        self.epoch += 1;
    }

    /// Drops what is not global.
    pub fn flush_local(&mut self) {
        for &index in &self.local {
            let entry = &mut self.entries[index as usize];
            if entry.meta & GLOBAL == 0 {
                *entry = EMPTY;
            }
        }
        self.local.clear();
        self.fetch.iter_mut().filter(|e| e.meta & GLOBAL == 0).for_each(|e| *e = NO_FETCH);
        self.epoch += 1;
    }

    /// Drops every translation of the page (of whatever size) that holds `va`.
    pub fn flush_page(&mut self, va: u64) {
        let same = |page: u64, meta: u64| page & !1 != 0 && (page ^ va) >> (meta & 63) == 0 || page == va & PAGE_MASK;
        for entry in self.entries.iter_mut() {
            if (entry.read != NO_PAGE && same(entry.read, entry.meta))
                || (entry.write != NO_PAGE && same(entry.write, entry.meta))
            {
                *entry = EMPTY;
            }
        }
        for entry in self.fetch.iter_mut() {
            if entry.page != NO_PAGE && same(entry.page, entry.meta) {
                *entry = NO_FETCH;
            }
        }
        self.epoch += 1;
    }

    /// Writes to any page must be looked at again: a page has become code.
    pub fn drop_writes(&mut self) {
        self.entries.iter_mut().for_each(|e| e.write = NO_PAGE);
    }
}

/// Where a linear address leads.
#[derive(Clone, Copy)]
pub(crate) struct Physical {
    pub gpa: u64,
    /// A write through this translation has its dirty bit set.
    dirty: bool,
    meta: u64,
}

// Page-table entry bits, SDM 3A 4.5.
const P: u64 = 1;
const RW: u64 = 2;
const US: u64 = 4;
const A: u64 = 0x20;
const D: u64 = 0x40;
const PS: u64 = 0x80;
const G: u64 = 0x100;
const NX: u64 = 1 << 63;
/// Physical address bits of the guest.
pub(crate) const PHYS_BITS: u32 = 40;
const ADDRESS: u64 = ((1 << PHYS_BITS) - 1) & PAGE_MASK;

impl Cpu {
    #[inline(always)]
    fn set_now(&self) -> usize {
        self.tlb.set
    }

    /// Loads from a linear address.
    #[inline(always)]
    pub fn load<T: GuestWord>(&mut self, io: Io<'_>, va: u64) -> Result<T, Stop> {
        let entry = self.tlb.entry(va);
        if entry.read == va & PAGE_MASK && (T::BYTES == 1 || va & (PAGE_BYTES - 1) <= PAGE_BYTES - T::BYTES) {
            return Ok(T::load(HostPtr(va.wrapping_add(entry.addend))));
        }
        self.load_slow(io, va, T::BYTES, self.set_now()).map(T::from_u64)
    }

    /// Stores to a linear address, as the last thing an instruction does: [`Stop::Next`] where decoded code was hit.
    #[inline(always)]
    pub fn store<T: GuestWord>(&mut self, io: Io<'_>, va: u64, value: T) -> Flow {
        let entry = self.tlb.entry(va);
        if entry.write == va & PAGE_MASK && (T::BYTES == 1 || va & (PAGE_BYTES - 1) <= PAGE_BYTES - T::BYTES) {
            T::store(HostPtr(va.wrapping_add(entry.addend)), value);
            return Ok(());
        }
        self.store_slow(io, va, value.to_u64(), T::BYTES, self.set_now())?;
        self.settle()
    }

    /// Stores when the instruction still has something to do; it ends with [`Cpu::settle`] or with a branch.
    #[inline(always)]
    pub fn store_then<T: GuestWord>(&mut self, io: Io<'_>, va: u64, value: T) -> Flow {
        let entry = self.tlb.entry(va);
        if entry.write == va & PAGE_MASK && (T::BYTES == 1 || va & (PAGE_BYTES - 1) <= PAGE_BYTES - T::BYTES) {
            T::store(HostPtr(va.wrapping_add(entry.addend)), value);
            return Ok(());
        }
        self.store_slow(io, va, value.to_u64(), T::BYTES, self.set_now())
    }

    /// Leaves the block if one of the instruction's stores hit decoded code or made an interrupt deliverable (a register
    /// of the local APIC).
    #[inline(always)]
    pub fn settle(&mut self) -> Flow {
        if self.attention & (attention::CODE | attention::INTERRUPT) != 0 { Err(Stop::Next) } else { Ok(()) }
    }

    /// Reads, computes, writes: the page must be writable before anything is read (or MMIO is touched).
    #[inline(always)]
    pub fn modify<T: GuestWord>(&mut self, io: Io<'_>, va: u64, change: impl FnOnce(&mut Cpu, T) -> T) -> Flow {
        let entry = self.tlb.entry(va);
        if entry.write == va & PAGE_MASK && (T::BYTES == 1 || va & (PAGE_BYTES - 1) <= PAGE_BYTES - T::BYTES) {
            let at = HostPtr(va.wrapping_add(entry.addend));
            let new = change(self, T::load(at));
            T::store(at, new);
            return Ok(());
        }
        self.probe_write(va, T::BYTES)?;
        let old = self.load::<T>(io, va)?;
        let new = change(self, old);
        self.store_slow(io, va, new.to_u64(), T::BYTES, self.set_now())?;
        self.settle()
    }

    /// Raises the fault that a write of `bytes` at `va` would raise; changes nothing else.
    pub fn probe_write(&mut self, va: u64, bytes: u64) -> Flow {
        let set = self.check_alignment(va, bytes, self.set_now())?;
        let access = Access { write: true, exec: false, set };
        self.check_canonical(va, bytes)?;
        self.translate(va, access)?;
        let last = va.wrapping_add(bytes - 1) & PAGE_MASK;
        if last != va & PAGE_MASK {
            // The fault is reported at the first byte of the second page.
            self.translate(last, access)?;
        }
        Ok(())
    }

    /// #GP where an operand's last byte is not canonical or, in flat 32-bit segments whose limits nobody else looks at,
    /// lies beyond 4 GiB: found before any page is looked at.
    pub fn check_canonical(&mut self, va: u64, bytes: u64) -> Flow {
        let last = va.wrapping_add(bytes - 1);
        let beyond = if self.long64() { !crate::segment::canonical(last) } else { self.mode.flat && last >> 32 != 0 };
        if beyond { self.gp(0) } else { Ok(()) }
    }

    /// [`Cpu::probe_write`] that is cheap where the TLB knows the page.
    #[inline(always)]
    pub fn probe_write_quick(&mut self, va: u64, bytes: u64) -> Flow {
        let entry = self.tlb.entry(va);
        if entry.write == va & PAGE_MASK && va & (PAGE_BYTES - 1) <= PAGE_BYTES - bytes {
            return Ok(());
        }
        self.probe_write(va, bytes)
    }

    /// Reads with supervisor rights: descriptor tables, task state.
    pub fn load_sys(&mut self, io: Io<'_>, va: u64, bytes: u64) -> Result<u64, Stop> {
        self.load_slow(io, va, bytes, KERNEL)
    }

    /// Writes with supervisor rights.
    pub fn store_sys(&mut self, io: Io<'_>, va: u64, value: u64, bytes: u64) -> Flow {
        self.store_slow(io, va, value, bytes, KERNEL)
    }

    /// As a stack access of privilege `cpl` does, which may not be the current one.
    pub fn store_as(&mut self, io: Io<'_>, cpl: u8, va: u64, value: u64, bytes: u64) -> Flow {
        self.store_slow(io, va, value, bytes, if cpl == 3 { USER } else { KERNEL })
    }

    /// #AC(0) for an address that is no multiple of the operand's size, where ring 3 asked for it. The set to translate
    /// with. SDM 3A 6.15 "Interrupt 17 - Alignment Check Exception".
    fn check_alignment(&mut self, va: u64, bytes: u64, set: usize) -> Result<usize, Stop> {
        match set {
            USER_ALIGNED if matches!(bytes, 2 | 4 | 8) && va & (bytes - 1) != 0 => self.raise_code(17, 0),
            USER_ALIGNED => Ok(USER),
            _ => Ok(set),
        }
    }

    #[cold]
    #[inline(never)]
    fn load_slow(&mut self, io: Io<'_>, va: u64, bytes: u64, set: usize) -> Result<u64, Stop> {
        let set = self.check_alignment(va, bytes, set)?;
        let access = Access { write: false, exec: false, set };
        let room = PAGE_BYTES - (va & (PAGE_BYTES - 1));
        self.check_canonical(va, bytes)?;
        let first = self.translate(va, access)?;
        if bytes <= room {
            self.fill(va, first, access);
            return Ok(self.physical_load(io, first.gpa, bytes));
        }
        let second = self.translate(va.wrapping_add(room), access)?;
        let mut value = 0;
        for i in 0..bytes {
            let gpa = if i < room { first.gpa + i } else { second.gpa + i - room };
            value |= self.physical_load(io, gpa, 1) << (8 * i);
        }
        Ok(value)
    }

    #[cold]
    #[inline(never)]
    fn store_slow(&mut self, io: Io<'_>, va: u64, value: u64, bytes: u64, set: usize) -> Flow {
        let set = self.check_alignment(va, bytes, set)?;
        let access = Access { write: true, exec: false, set };
        let room = PAGE_BYTES - (va & (PAGE_BYTES - 1));
        self.check_canonical(va, bytes)?;
        let first = self.translate(va, access)?;
        if bytes <= room {
            self.fill(va, first, access);
            self.physical_store(io, first.gpa, value, bytes);
            return Ok(());
        }
        let second = self.translate(va.wrapping_add(room), access)?;
        for i in 0..bytes {
            let gpa = if i < room { first.gpa + i } else { second.gpa + i - room };
            self.physical_store(io, gpa, value >> (8 * i) & 0xff, 1);
        }
        Ok(())
    }

    /// The physical address behind `va` for `access`, accessed and dirty bits set; or the page fault.
    pub fn translate(&mut self, va: u64, access: Access) -> Result<Physical, Stop> {
        if self.cr0 & cr::PG == 0 {
            return Ok(Physical { gpa: va & 0xffff_ffff, dirty: true, meta: 12 });
        }
        if self.long_mode() {
            if self.long64() && (va as i64) << 16 >> 16 != va as i64 {
                return self.gp(0);
            }
            return self.walk64(va, access);
        }
        let va = va & 0xffff_ffff;
        if self.cr4 & cr::PAE != 0 { self.walk_pae(va, access) } else { self.walk32(va, access) }
    }

    fn page_fault<T>(&mut self, va: u64, access: Access, present: bool, reserved: bool) -> Result<T, Stop> {
        self.cr2 = va;
        let fetch_bit =
            access.exec && (self.cr4 & cr::SMEP != 0 || (self.cr4 & cr::PAE != 0 && self.efer & cr::NXE != 0));
        let error = present as u32
            | (access.write as u32) << 1
            | ((access.set == USER) as u32) << 2
            | (reserved as u32) << 3
            | (fetch_bit as u32) << 4;
        self.raise_code(14, error)
    }

    /// Reads a page-table entry; outside RAM reads as all ones, which has reserved bits set.
    fn table_entry(&self, gpa: u64) -> u64 {
        match self.ram.host_page(Gpa(gpa)) {
            Some((page, ..)) => hostmem::load64(HostPtr(page as u64 + (gpa & (PAGE_BYTES - 1)))),
            None => u64::MAX,
        }
    }

    fn mark_entry(&mut self, gpa: u64, old: u64, bits: u64, wide: bool) -> bool {
        if old & bits == bits {
            return true;
        }
        let Some((page, marks, index)) = self.ram.host_page(Gpa(gpa)) else { return true };
        let code = marks.get(index) & MARK_CODE != 0;
        let at = HostPtr(page as u64 + (gpa & (PAGE_BYTES - 1)));
        if code && self.code_map.store(gpa, 8) {
            self.attention |= attention::CODE;
        }
        if wide {
            hostmem::cmpxchg64(at, old, old | bits)
        } else {
            hostmem::cmpxchg32(at, old as u32, (old | bits) as u32)
        }
    }

    /// Rights of a completed walk. SDM 3A 4.6.1 "Determination of Access Rights".
    fn permitted(&self, access: Access, user: bool, writable: bool, no_exec: bool) -> bool {
        if access.exec && no_exec {
            return false;
        }
        if access.set == USER {
            return user && (!access.write || writable);
        }
        if user {
            if access.exec && self.cr4 & cr::SMEP != 0 {
                return false;
            }
            if !access.exec && access.set == KERNEL && self.cr4 & cr::SMAP != 0 {
                return false;
            }
        }
        !access.write || writable || self.cr0 & cr::WP == 0
    }

    fn walk64(&mut self, va: u64, access: Access) -> Result<Physical, Stop> {
        self.walk_levels(va, access, self.cr3 & ADDRESS, 39, None)
    }

    fn walk_pae(&mut self, va: u64, access: Access) -> Result<Physical, Stop> {
        let pdpte = self.pdpte[(va >> 30) as usize & 3];
        if pdpte & P == 0 {
            return self.page_fault(va, access, false, false);
        }
        // PDPTEs carry no rights: RW and US come from the levels below.
        self.walk_levels(va, access, pdpte & ADDRESS, 21, Some(RW | US))
    }

    /// The 64-bit-entry formats (PAE and 4-level), from the table at `table` whose entries map 1 << `shift` bytes.
    fn walk_levels(
        &mut self,
        va: u64,
        access: Access,
        table: u64,
        shift: u32,
        rights: Option<u64>,
    ) -> Result<Physical, Stop> {
        'retry: loop {
            let (mut table, mut shift) = (table, shift);
            let mut rights = rights.unwrap_or(RW | US);
            let mut no_exec = 0;
            loop {
                let at = table + (va >> shift & 511) * 8;
                let entry = self.table_entry(at);
                if entry & P == 0 {
                    return self.page_fault(va, access, false, false);
                }
                let leaf = shift == 12 || entry & PS != 0 && (shift == 21 || shift == 30);
                let mut reserved = ((1u64 << 52) - 1) & !((1 << PHYS_BITS) - 1);
                if self.efer & cr::NXE == 0 {
                    reserved |= NX;
                }
                if !self.long_mode() {
                    reserved |= 0x7ff0_0000_0000_0000;
                }
                if leaf && shift > 12 {
                    reserved |= ((1 << shift) - 1) & !0x1fff;
                } else if shift == 39 {
                    reserved |= PS;
                }
                if entry & reserved != 0 {
                    return self.page_fault(va, access, true, true);
                }
                rights &= entry;
                no_exec |= entry & NX;
                if !leaf {
                    if !self.mark_entry(at, entry, A, true) {
                        continue 'retry;
                    }
                    table = entry & ADDRESS;
                    shift -= 9;
                    continue;
                }
                if !self.permitted(access, rights & US != 0, rights & RW != 0, no_exec != 0) {
                    return self.page_fault(va, access, true, false);
                }
                let bits = if access.write { A | D } else { A };
                if !self.mark_entry(at, entry, bits, true) {
                    continue 'retry;
                }
                let offset_mask = (1u64 << shift) - 1;
                let gpa = entry & ADDRESS & !offset_mask | va & offset_mask;
                let global = if entry & G != 0 && self.cr4 & cr::PGE != 0 { GLOBAL } else { 0 };
                return Ok(Physical { gpa, dirty: access.write || entry & D != 0, meta: shift as u64 | global });
            }
        }
    }

    /// 32-bit paging with 4 KiB and 4 MiB pages. SDM 3A 4.3.
    fn walk32(&mut self, va: u64, access: Access) -> Result<Physical, Stop> {
        loop {
            let pde_at = (self.cr3 & 0xffff_f000) + (va >> 22) * 4;
            let pde = self.table_entry(pde_at) & 0xffff_ffff;
            if pde & P == 0 {
                return self.page_fault(va, access, false, false);
            }
            let large = pde & PS != 0 && self.cr4 & cr::PSE != 0;
            let (at, entry, shift, rights) = if large {
                if pde & (1 << 21) != 0 {
                    return self.page_fault(va, access, true, true);
                }
                (pde_at, pde, 22, pde)
            } else {
                let at = (pde & 0xffff_f000) + (va >> 12 & 1023) * 4;
                let pte = self.table_entry(at) & 0xffff_ffff;
                if pte & P == 0 {
                    return self.page_fault(va, access, false, false);
                }
                (at, pte, 12, pde & pte)
            };
            if !self.permitted(access, rights & US != 0, rights & RW != 0, false) {
                return self.page_fault(va, access, true, false);
            }
            let marked = (large || self.mark_entry(pde_at, pde, A, false))
                && self.mark_entry(at, entry, if access.write { A | D } else { A }, false);
            if !marked {
                continue;
            }
            let gpa = if large {
                // PSE-36: bits 39:32 of the address in bits 20:13 of the entry.
                (entry & 0xffc0_0000) | (entry >> 13 & 0xff) << 32 | va & 0x3f_ffff
            } else {
                entry & 0xffff_f000 | va & 0xfff
            };
            let global = if entry & G != 0 && self.cr4 & cr::PGE != 0 { GLOBAL } else { 0 };
            return Ok(Physical { gpa, dirty: access.write || entry & D != 0, meta: shift | global });
        }
    }

    /// Loads the four PDPTEs of PAE paging, as a write of CR3 does. False: a reserved bit is set, nothing changed.
    pub fn load_pdptes(&mut self, cr3: u64) -> bool {
        let base = cr3 & 0xffff_ffe0;
        let entries = [0, 8, 16, 24].map(|offset| self.table_entry(base + offset));
        let reserved = !ADDRESS & !0xe19;
        if entries.iter().any(|e| e & P != 0 && e & reserved != 0) {
            return false;
        }
        self.pdpte = entries;
        true
    }

    /// Remembers a translation for the fast path, where the page is RAM.
    fn fill(&mut self, va: u64, to: Physical, access: Access) {
        let Some((page, marks, index)) = self.ram.host_page(Gpa(to.gpa)) else { return };
        if self.is_apic_page(to.gpa) {
            return;
        }
        let code = marks.get(index) & MARK_CODE != 0;
        let va_page = va & PAGE_MASK;
        let slot = access.set * SET_ENTRIES + slot(va);
        let entry = &mut self.tlb.entries[slot & (4 * SET_ENTRIES - 1)];
        if entry.read != va_page {
            entry.write = NO_PAGE;
        }
        entry.read = va_page;
        if access.write && to.dirty && !code {
            entry.write = va_page;
        } else if code {
            entry.write = NO_PAGE;
        }
        entry.addend = (page as u64).wrapping_sub(va_page);
        entry.meta = to.meta;
        if to.meta & GLOBAL == 0 {
            self.tlb.local.push(slot as u16);
        }
        if self.tlb.local.len() > 8 * SET_ENTRIES {
            self.tlb.local.sort_unstable();
            self.tlb.local.dedup();
        }
    }

    /// The page of guest-physical memory that holds the code at `va`.
    pub fn fetch_page(&mut self, va: u64) -> Result<u64, Stop> {
        let index = ((va >> 12) ^ (va >> 20)) as usize & 255 | (self.set_now() & 1) << 8;
        let entry = self.tlb.fetch[index & 511];
        if entry.page == va & PAGE_MASK {
            return Ok(entry.gpa);
        }
        let set = if matches!(self.set_now(), USER | USER_ALIGNED) { USER } else { KERNEL };
        let to = self.translate(va, Access { write: false, exec: true, set })?;
        let gpa = to.gpa & PAGE_MASK;
        self.tlb.fetch[index & 511] = FetchEntry { page: va & PAGE_MASK, gpa, meta: to.meta };
        Ok(gpa)
    }

    /// Host pointer for `bytes` at `va` if they lie in one page of plain RAM that may be accessed so; used by string
    /// instructions to move many elements at once. `None`: go element by element.
    pub fn host_range(&mut self, va: u64, write: bool) -> Option<HostPtr> {
        let entry = self.tlb.entry(va);
        let tag = if write { entry.write } else { entry.read };
        (tag == va & PAGE_MASK).then(|| HostPtr(va.wrapping_add(entry.addend)))
    }

    pub(crate) fn physical_load(&mut self, io: Io<'_>, gpa: u64, bytes: u64) -> u64 {
        if self.is_apic_page(gpa) {
            return self.apic_mmio_read(gpa, bytes);
        }
        if let Some((page, ..)) = self.ram.host_page(Gpa(gpa)) {
            let at = HostPtr(page as u64 + (gpa & (PAGE_BYTES - 1)));
            return match bytes {
                1 => hostmem::load8(at) as u64,
                2 => hostmem::load16(at) as u64,
                4 => hostmem::load32(at) as u64,
                _ => hostmem::load64(at),
            };
        }
        if bytes.is_power_of_two() {
            return io.mmio_read(Gpa(gpa), bytes as u8) & (u64::MAX >> (64 - 8 * bytes));
        }
        (0..bytes).fold(0, |value, i| value | (io.mmio_read(Gpa(gpa + i), 1) & 0xff) << (8 * i))
    }

    pub(crate) fn physical_store(&mut self, io: Io<'_>, gpa: u64, value: u64, bytes: u64) {
        if self.is_apic_page(gpa) {
            return self.apic_mmio_write(io, gpa, value, bytes);
        }
        if let Some((page, marks, index)) = self.ram.host_page(Gpa(gpa)) {
            if marks.get(index) & MARK_CODE != 0 && self.code_map.store(gpa, bytes) {
                self.attention |= attention::CODE;
            }
            let at = HostPtr(page as u64 + (gpa & (PAGE_BYTES - 1)));
            return match bytes {
                1 => hostmem::store8(at, value as u8),
                2 => hostmem::store16(at, value as u16),
                4 => hostmem::store32(at, value as u32),
                _ => hostmem::store64(at, value),
            };
        }
        io.mmio_write(Gpa(gpa), bytes as u8, value);
    }

    /// The linear address of an operation's memory operand, its segment checked where one applies.
    #[inline(always)]
    pub fn ea(&mut self, op: &Op, bytes: u64, write: bool) -> Result<u64, Stop> {
        let offset = self.offset(op);
        match op.kind & addr::MODE {
            addr::LONG => {
                let va = offset.wrapping_add(self.seg_base[op.seg as usize & 7]);
                if op.seg == STACK_SEG && !crate::segment::canonical(va) {
                    return self.raise_code(12, 0);
                }
                Ok(va)
            }
            addr::LONG32 => Ok((offset & 0xffff_ffff).wrapping_add(self.seg_base[op.seg as usize & 7])),
            addr::FLAT => Ok(offset & 0xffff_ffff),
            _ => self.segmented(op.seg, self.wrap_offset(op, offset), bytes, write),
        }
    }

    /// Base + index * scale + displacement, not yet cut to the address size.
    #[inline(always)]
    pub fn offset(&self, op: &Op) -> u64 {
        self.gpr[op.base as usize & 31]
            .wrapping_add(self.gpr[op.index as usize & 31] << (op.scale & 3))
            .wrapping_add(op.disp as i64 as u64)
    }

    #[inline(always)]
    pub fn wrap_offset(&self, op: &Op, offset: u64) -> u64 {
        if op.kind & addr::OFFSET16 != 0 { offset & 0xffff } else { offset & 0xffff_ffff }
    }

    /// Limit and rights of a legacy segment access. SDM 3A 5.3 "Limit Checking", 5.4 "Type Checking".
    pub fn segmented(&mut self, seg: u8, offset: u64, bytes: u64, write: bool) -> Result<u64, Stop> {
        let s = self.seg[seg as usize % 6];
        let vector = if seg as usize == crate::cpu::SS { 12 } else { 13 };
        let last = offset + bytes - 1;
        let code = s.kind() & 8 != 0;
        let expand_down = !code && s.kind() & 4 != 0;
        let inside = if expand_down {
            let top = if s.big() { 0xffff_ffff } else { 0xffff };
            offset > s.limit as u64 && last <= top
        } else {
            last <= s.limit as u64
        };
        let allowed = if !self.protected() {
            true
        } else if write {
            s.usable() && !code && s.kind() & 2 != 0
        } else {
            s.usable() && (!code || s.kind() & 2 != 0)
        };
        if !inside || !allowed {
            return self.raise_code(vector, 0);
        }
        Ok((s.base.wrapping_add(offset)) & 0xffff_ffff)
    }
}

/// A word that guest memory can hold.
pub(crate) trait GuestWord: Word {
    fn load(at: HostPtr) -> Self;
    fn store(at: HostPtr, value: Self);
}
macro_rules! guest_word {
    ($($t:ty, $load:ident, $store:ident;)*) => {$(
        impl GuestWord for $t {
            #[inline(always)]
            fn load(at: HostPtr) -> $t {
                hostmem::$load(at)
            }
            #[inline(always)]
            fn store(at: HostPtr, value: $t) {
                hostmem::$store(at, value)
            }
        }
    )*};
}
guest_word! { u8, load8, store8; u16, load16, store16; u32, load32, store32; u64, load64, store64; }

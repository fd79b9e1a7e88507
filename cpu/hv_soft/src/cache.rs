//! Decoded blocks: where they are, what they hold, and when they go.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use guest_ram::{Gpa, PAGE_BYTES};

use crate::cpu::{CS, Cpu, Op, Stop};
use crate::decode::{self, BlockDecoder, MAX_LENGTH, Next};
use crate::hostmem::{self, HostPtr};
use crate::native::Native;

/// The most instructions of one block.
const MAX_INSTRUCTIONS: usize = 64;
/// The most bytes looked at for one block.
const MAX_BYTES: usize = 320;
/// No second page.
const NO_PAGE: u64 = u64::MAX;

/// A run of instructions that is entered at its first byte.
#[derive(Clone, Copy)]
pub(crate) struct Block {
    first_op: u32,
    op_count: u16,
    /// Instructions in the block: its operations but the last, which leaves it.
    pub instructions: u16,
    gpa: u64,
    bytes: u16,
    key: u8,
    live: bool,
    /// Page of the bytes beyond the first page's end, or [`NO_PAGE`].
    second_page: u64,
}

/// An entry of the table from linear addresses to blocks.
#[derive(Clone, Copy)]
struct Jump {
    pc: u64,
    tag: u64,
    block: u32,
}
const NO_JUMP: Jump = Jump { pc: 0, tag: 0, block: 0 };
const JUMPS: usize = 4096;

#[derive(Default)]
pub(crate) struct KeyHasher(u64);
impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&b| self.write_u64(b as u64));
    }
    fn write_u64(&mut self, value: u64) {
        let mixed = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ mixed >> 32;
    }
}
type Map<V> = HashMap<u64, V, BuildHasherDefault<KeyHasher>>;

/// All blocks of one vCPU, bounded in bytes.
pub(crate) struct BlockCache {
    ops: Vec<Op>,
    blocks: Vec<Block>,
    by_address: Map<u32>,
    by_page: Map<Vec<u32>>,
    jumps: Box<[Jump; JUMPS]>,
    max_ops: usize,
}

impl BlockCache {
    /// A cache that holds at most about `bytes` of decoded operations and their bookkeeping.
    pub fn new(bytes: u64) -> BlockCache {
        // Bookkeeping (block, two map entries) takes about as much as four operations, and a block has five to ten.
        let max_ops = (bytes as usize / size_of::<Op>() * 2 / 3).max(4 * MAX_INSTRUCTIONS);
        BlockCache {
            ops: Vec::new(),
            blocks: Vec::new(),
            by_address: Map::default(),
            by_page: Map::default(),
            jumps: Box::new([NO_JUMP; JUMPS]),
            max_ops,
        }
    }

    pub fn ops(&self, block: Block) -> &[Op] {
        let first = block.first_op as usize;
        self.ops.get(first..first + block.op_count as usize).unwrap_or_default()
    }

    /// The block at `cpu.rip`, decoded if need be; or the fault of fetching it.
    #[inline(always)]
    pub fn lookup(&mut self, cpu: &mut Cpu, native: &mut Native) -> Result<Block, Stop> {
        let pc = cpu.rip.wrapping_add(cpu.seg_base[CS]);
        let tag = cpu.tlb.epoch << 6 | (cpu.mode.key() | ((cpu.cpl == 3) as u8) << 5) as u64;
        let slot = (pc ^ pc >> 12) as usize & (JUMPS - 1);
        let jump = self.jumps[slot];
        if jump.pc == pc && jump.tag == tag {
            return Ok(self.blocks[jump.block as usize]);
        }
        self.lookup_slow(cpu, native, pc, slot)
    }

    #[cold]
    #[inline(never)]
    fn lookup_slow(&mut self, cpu: &mut Cpu, native: &mut Native, pc: u64, slot: usize) -> Result<Block, Stop> {
        let pc = if cpu.long64() { pc } else { pc & 0xffff_ffff };
        if !cpu.long64() && cpu.rip > cpu.seg[CS].limit as u64 {
            return cpu.gp(0);
        }
        let gpa = cpu.fetch_page(pc)? | pc & (PAGE_BYTES - 1);
        let key = cpu.mode.key();
        let index = match self.by_address.get(&(gpa << 8 | key as u64)).copied() {
            Some(index) if self.second_page_matches(cpu, pc, index)? => index,
            _ => self.build(cpu, native, pc, gpa, MAX_INSTRUCTIONS)?,
        };
        // Decoding may have changed the epoch; the tag is what holds now.
        let tag = cpu.tlb.epoch << 6 | (key | ((cpu.cpl == 3) as u8) << 5) as u64;
        let full_pc = cpu.rip.wrapping_add(cpu.seg_base[CS]);
        self.jumps[slot] = Jump { pc: full_pc, tag, block: index };
        Ok(self.blocks[index as usize])
    }

    fn second_page_matches(&mut self, cpu: &mut Cpu, pc: u64, index: u32) -> Result<bool, Stop> {
        let second = self.blocks[index as usize].second_page;
        if second == NO_PAGE {
            return Ok(true);
        }
        let next = (pc | (PAGE_BYTES - 1)).wrapping_add(1);
        if cpu.fetch_page(next)? == second {
            return Ok(true);
        }
        self.kill(index);
        Ok(false)
    }

    /// A block of the one instruction at `cpu.rip`, not kept for others to find.
    pub fn single(&mut self, cpu: &mut Cpu, native: &mut Native) -> Result<Block, Stop> {
        let pc = cpu.rip.wrapping_add(cpu.seg_base[CS]);
        let pc = if cpu.long64() { pc } else { pc & 0xffff_ffff };
        let gpa = cpu.fetch_page(pc)? | pc & (PAGE_BYTES - 1);
        let index = self.build(cpu, native, pc, gpa, 1)?;
        self.by_address.remove(&(gpa << 8 | cpu.mode.key() as u64));
        Ok(self.blocks[index as usize])
    }

    fn build(&mut self, cpu: &mut Cpu, native: &mut Native, pc: u64, gpa: u64, limit: usize) -> Result<u32, Stop> {
        if self.ops.len() + MAX_INSTRUCTIONS + 1 > self.max_ops || native.nearly_full() {
            self.flush(cpu);
            native.reset();
        }
        let Some((page, ..)) = cpu.ram.host_page(Gpa(gpa)) else {
            return cpu
                .give_up(format!("instructions outside guest memory (at guest address {gpa:#x}) cannot be executed"));
        };
        let offset = gpa & (PAGE_BYTES - 1);
        let room = (PAGE_BYTES - offset) as usize;
        let in_page = room.min(MAX_BYTES);
        // Marked before the bytes are read: a write from now on is noticed.
        let mut new_page = cpu.code_map.add(&cpu.ram, gpa, in_page as u64);
        let mut bytes = [0u8; MAX_BYTES + MAX_LENGTH];
        hostmem::read_bytes(HostPtr(page as u64 + offset), &mut bytes[..in_page]);
        let first_op = self.ops.len();
        let mut used = self.decode(cpu, native, &bytes[..in_page], limit);
        let mut second_page = NO_PAGE;
        if used == 0 && in_page == room {
            // The first instruction reaches into the next page.
            let next = (pc | (PAGE_BYTES - 1)).wrapping_add(1);
            let second = cpu.fetch_page(next)?;
            let Some((page, ..)) = cpu.ram.host_page(Gpa(second)) else {
                return cpu.give_up(format!(
                    "instructions outside guest memory (at guest address {second:#x}) cannot be executed"
                ));
            };
            new_page |= cpu.code_map.add(&cpu.ram, second, MAX_LENGTH as u64);
            hostmem::read_bytes(HostPtr(page as u64), &mut bytes[room..room + MAX_LENGTH]);
            used = self.decode(cpu, native, &bytes[..room + MAX_LENGTH], 1);
            second_page = second;
        }
        if used == 0 {
            // Longer than 15 bytes. SDM 2A 2.3.11.
            return cpu.gp(0);
        }
        if new_page {
            cpu.tlb.drop_writes();
        }
        let op_count = (self.ops.len() - first_op) as u16;
        let index = self.blocks.len() as u32;
        let key = cpu.mode.key();
        self.blocks.push(Block {
            first_op: first_op as u32,
            op_count,
            instructions: op_count - 1,
            gpa,
            bytes: used as u16,
            key,
            live: true,
            second_page,
        });
        self.by_address.insert(gpa << 8 | key as u64, index);
        self.by_page.entry(gpa & !(PAGE_BYTES - 1)).or_default().push(index);
        if second_page != NO_PAGE {
            self.by_page.entry(second_page).or_default().push(index);
        }
        Ok(index)
    }

    /// Appends the operations of a block; the number of bytes they cover.
    fn decode(&mut self, cpu: &Cpu, native: &mut Native, bytes: &[u8], limit: usize) -> usize {
        let mut decoder = BlockDecoder::new(bytes, cpu.mode, cpu.rip, native);
        for _ in 0..limit {
            match decoder.next() {
                Next::NeedsMore => break,
                Next::Op(decoded) => {
                    self.ops.push(decoded.op);
                    if decoded.ends {
                        break;
                    }
                }
            }
        }
        let used = decoder.position();
        if used != 0 {
            self.ops.push(decode::end_of_block(used));
        }
        used
    }

    fn kill(&mut self, index: u32) {
        let block = &mut self.blocks[index as usize];
        if block.live {
            block.live = false;
            let key = block.gpa << 8 | block.key as u64;
            if self.by_address.get(&key) == Some(&index) {
                self.by_address.remove(&key);
            }
        }
    }

    /// Blocks that overlap a store are forgotten.
    pub fn invalidate(&mut self, cpu: &mut Cpu, gpa: u64, bytes: u64) {
        let page = gpa & !(PAGE_BYTES - 1);
        let Some(list) = self.by_page.remove(&page) else {
            cpu.code_map.forget_page(&cpu.ram, page);
            return;
        };
        let (mut kept, mut dead) = (Vec::new(), Vec::new());
        for index in list {
            let block = self.blocks[index as usize];
            if !block.live {
                continue;
            }
            let overlaps = if block.second_page == page {
                gpa - page < MAX_LENGTH as u64
            } else {
                gpa < block.gpa + block.bytes as u64 && block.gpa < gpa + bytes
            };
            if overlaps { dead.push(index) } else { kept.push(index) }
        }
        dead.iter().for_each(|&index| self.kill(index));
        // The page's granules are what the surviving blocks cover.
        cpu.code_map.forget_page(&cpu.ram, page);
        for &index in &kept {
            let block = self.blocks[index as usize];
            if block.second_page == page {
                cpu.code_map.add(&cpu.ram, page, MAX_LENGTH as u64);
            } else {
                let room = PAGE_BYTES - (block.gpa & (PAGE_BYTES - 1));
                cpu.code_map.add(&cpu.ram, block.gpa, (block.bytes as u64).min(room));
            }
        }
        if !kept.is_empty() {
            self.by_page.insert(page, kept);
        }
        cpu.tlb.epoch += 1;
    }

    /// Forgets everything.
    pub fn flush(&mut self, cpu: &mut Cpu) {
        self.ops.clear();
        self.blocks.clear();
        self.by_address.clear();
        self.by_page.clear();
        cpu.code_map.forget_all(&cpu.ram);
        cpu.tlb.epoch += 1;
    }
}

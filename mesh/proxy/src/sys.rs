//! The few calls that have no safe wrapper: taking over inherited file descriptors, the allocator, giving memory back.
#![allow(unsafe_code)] // the crate's only unsafe code, each block with its proof

use std::alloc::{GlobalAlloc, Layout};
use std::ffi::c_void;
use std::net::TcpListener;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Blocks of mimalloc are aligned to this, if they are as large (`MI_MAX_ALIGN_SIZE`).
const NATURAL: usize = 16;

/// mimalloc as the program's allocator. Unlike the `mimalloc` crate's it asks for an alignment only where that is more
/// than every block has: asked for one, mimalloc takes a slow way for all sizes but the smallest, which was a fifteenth of
/// the instructions of a request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Allocator;

/// `mi_option_purge_delay` of mimalloc 3: the crate has no name for it. In milliseconds, ten times as long for what matters.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
/// What it is while the proxy serves. Freed memory is kept for a second: for as long as a burst of requests or of
/// configuration is likely to want it again, and shorter than it takes until somebody looks whether the burst is over.
const SERVING: std::ffi::c_long = 100;

impl Allocator {
    /// From now on freed memory is given back at once. A start frees many times what it keeps, and what is kept would come
    /// to lie on it: a page of the allocator that holds one block of a few is resident whole if it was before. Eleven
    /// megabytes of a proxy with a thousand clusters held three.
    pub fn begin(self) {
        // SAFETY: sets a number, under which nothing breaks whatever it is.
        unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, 0) };
    }

    /// From now on freed memory is kept for a while.
    pub fn serve(self) {
        // SAFETY: as in `begin`.
        unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, SERVING) };
    }
}

fn is_natural(layout: Layout) -> bool {
    layout.align() <= NATURAL && layout.align() <= layout.size()
}

// SAFETY: mimalloc's functions are the allocator's of one heap, never unwind, and return null when there is no memory.
// `mi_malloc` and its kin give blocks aligned to the largest power of two that is not above their size, up to 16 bytes
// (a test below looks); whatever needs more goes through the aligned kind. `mi_free` and `mi_realloc` take blocks of either.
unsafe impl GlobalAlloc for Allocator {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: no preconditions but a power of two as alignment, which a layout has.
        unsafe {
            if is_natural(layout) {
                libmimalloc_sys::mi_malloc(layout.size()).cast()
            } else {
                libmimalloc_sys::mi_malloc_aligned(layout.size(), layout.align()).cast()
            }
        }
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as in `alloc`.
        unsafe {
            if is_natural(layout) {
                libmimalloc_sys::mi_zalloc(layout.size()).cast()
            } else {
                libmimalloc_sys::mi_zalloc_aligned(layout.size(), layout.align()).cast()
            }
        }
    }

    #[inline]
    unsafe fn dealloc(&self, block: *mut u8, _: Layout) {
        // SAFETY: the caller has the block from this allocator.
        unsafe { libmimalloc_sys::mi_free(block.cast::<c_void>()) }
    }

    #[inline]
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller has the block from this allocator, and `size` is not zero.
        unsafe {
            if layout.align() <= NATURAL && layout.align() <= size {
                libmimalloc_sys::mi_realloc(block.cast(), size).cast()
            } else {
                libmimalloc_sys::mi_realloc_aligned(block.cast(), size, layout.align()).cast()
            }
        }
    }
}

/// Takes ownership of the listening socket that the parent process left at descriptor `fd`.
///
/// Returns an error when the descriptor is not an open listening TCP socket, so a wrong `SERIN_LISTENERS` is told
/// instead of adopted.
pub(crate) fn adopt_listener(fd: RawFd) -> std::io::Result<TcpListener> {
    if fd < 3 {
        return Err(std::io::Error::other(
            "descriptors 0 to 2 are the standard streams",
        ));
    }
    nix::fcntl::fcntl(
        // SAFETY: borrowed for one F_GETFD only, which fails with EBADF on a closed descriptor and changes nothing.
        unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) },
        nix::fcntl::FcntlArg::F_GETFD,
    )
    .map_err(std::io::Error::from)?;
    // SAFETY: the descriptor is open (checked above) and named to us by SERIN_LISTENERS, the parent's promise that it
    // belongs to this process alone; it is adopted once, at start, by the only caller.
    let listener = unsafe { TcpListener::from_raw_fd(fd) };
    listener.local_addr()?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Takes ownership of descriptors that came with a message.
pub(crate) fn own_received(descriptors: Vec<RawFd>) -> impl Iterator<Item = OwnedFd> {
    // SAFETY: the kernel has just made these descriptors for this process (SCM_RIGHTS), and `recvmsg`, which returned
    // them as numbers, does not close them; each is taken once.
    descriptors
        .into_iter()
        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Gives memory that this thread's allocations left free back to the kernel. Costs some 10 µs with little to do.
pub(crate) fn collect_memory() {
    // SAFETY: may be called at any time from any thread; looks at the calling thread's heap and the shared arenas only.
    // In a program whose allocator is another one it finds nothing.
    unsafe { libmimalloc_sys::mi_collect(false) };
}

/// Unmaps the pages of the program and its libraries that have been read so far; what is used again is mapped again
/// from the page cache. After the start most of what was touched (argument parsing, relocations, compilation of
/// configuration and regular expressions) is not.
///
/// Returns the bytes looked at.
pub(crate) fn forget_startup_pages() -> usize {
    unsafe extern "C" fn segments(
        info: *mut nix::libc::dl_phdr_info,
        _size: usize,
        total: *mut std::ffi::c_void,
    ) -> std::ffi::c_int {
        // SAFETY: the dynamic linker hands out a valid structure and our own pointer for the time of the call.
        let (info, total) = unsafe { (&*info, &mut *total.cast::<usize>()) };
        if info.dlpi_phdr.is_null() {
            return 0;
        }
        // SAFETY: dlpi_phnum headers lie at dlpi_phdr for as long as the object is loaded.
        let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)) };
        // SAFETY: sysconf has no preconditions.
        let page = usize::try_from(unsafe { nix::libc::sysconf(nix::libc::_SC_PAGESIZE) }).unwrap_or(4096);
        for header in headers {
            // Segments that were never writable: relocations and RELRO are in writable ones. The vDSO has no file.
            let file_backed = info.dlpi_addr != 0 && !info.dlpi_name.is_null();
            if header.p_type != nix::libc::PT_LOAD || header.p_flags & nix::libc::PF_W != 0 || !file_backed {
                continue;
            }
            // Rounded inwards: a page at the edge may belong to a neighbouring segment.
            let start = ((info.dlpi_addr + header.p_vaddr) as usize).next_multiple_of(page);
            let end = (info.dlpi_addr + header.p_vaddr + header.p_memsz) as usize & !(page - 1);
            if end > start {
                // SAFETY: the whole pages of a read-only private file mapping: the kernel drops them and reads them
                // from the file when they are touched again, so no memory changes its content.
                unsafe { nix::libc::madvise(start as *mut _, end - start, nix::libc::MADV_DONTNEED) };
                *total += end - start;
            }
        }
        0
    }
    let mut total = 0usize;
    // SAFETY: the callback keeps to what it is given, does not unwind, and `total` outlives the call.
    unsafe { nix::libc::dl_iterate_phdr(Some(segments), std::ptr::from_mut(&mut total).cast()) };
    total
}

/// Lets the calling thread run soon after it is woken, also behind threads that have just begun their turn, by asking for
/// turns of a tenth of a millisecond, the shortest there are (`sched_setattr`, Linux 6.12). That takes no privilege and
/// gives the thread no more time than others, only earlier. Older kernels take no notice.
pub(crate) fn ask_for_short_turns() -> std::io::Result<()> {
    /// The kernel's `struct sched_attr`, as of its first version.
    #[repr(C)]
    #[derive(Default)]
    struct Attributes {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        /// The length of a turn in nanoseconds, for threads of the usual policy.
        runtime: u64,
        deadline: u64,
        period: u64,
    }
    const TURN: u64 = 100_000;
    /// `SCHED_FLAG_RESET_ON_FORK`.
    const RESET_ON_FORK: u64 = 1;
    let done = |result: nix::libc::c_long| match result {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    };
    let mut attributes = Attributes::default();
    let size = size_of::<Attributes>() as u32;
    // SAFETY: the kernel writes at most `size` bytes to the structure, which outlives the call; 0 is the calling thread.
    done(unsafe {
        nix::libc::syscall(
            nix::libc::SYS_sched_getattr,
            0,
            std::ptr::from_mut(&mut attributes),
            size,
            0,
        )
    })?;
    if i32::try_from(attributes.policy) != Ok(nix::libc::SCHED_OTHER) {
        // Whoever gave it another one has thought of something.
        return Ok(());
    }
    attributes.size = size;
    attributes.runtime = TURN;
    // Of this thread alone: an application that it starts is scheduled as all others.
    attributes.flags |= RESET_ON_FORK;
    // SAFETY: the kernel reads `size` bytes of the structure, which outlives the call; 0 is the calling thread.
    done(unsafe {
        nix::libc::syscall(
            nix::libc::SYS_sched_setattr,
            0,
            std::ptr::from_ref(&attributes),
            0,
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_may_ask_for_short_turns_again_and_again() {
        let thread = std::thread::spawn(|| (ask_for_short_turns(), ask_for_short_turns()));
        let (first, second) = thread.join().unwrap();
        // A sandbox may refuse the call; then it refuses it each time and nothing else happens.
        assert_eq!(first.is_ok(), second.is_ok(), "{first:?} {second:?}");
    }

    #[test]
    fn blocks_of_every_size_are_aligned_as_they_were_asked_for_and_keep_their_content() {
        for size in (1..=2_100).chain([4_095, 4_097, 8_192, 65_000, 1 << 20, (1 << 22) + 1]) {
            for align in [1, 2, 4, 8, 16, 32, 128, 4_096] {
                let layout = Layout::from_size_align(size, align).unwrap();
                // SAFETY: a layout of more than nothing; each block is freed once, as it was asked for last.
                unsafe {
                    let zeroed = Allocator.alloc_zeroed(layout);
                    let block = Allocator.alloc(layout);
                    assert_eq!(
                        (zeroed.addr() % align, block.addr() % align),
                        (0, 0),
                        "{layout:?}"
                    );
                    assert_eq!((*zeroed, *zeroed.add(size - 1)), (0, 0), "{layout:?}");
                    block.write(7);
                    let block = Allocator.realloc(block, layout, size * 2);
                    assert_eq!((block.addr() % align, *block), (0, 7), "{layout:?}");
                    Allocator.dealloc(block, Layout::from_size_align(size * 2, align).unwrap());
                    Allocator.dealloc(zeroed, layout);
                }
            }
        }
    }

    #[test]
    fn freed_memory_is_given_back_at_once_until_the_proxy_serves() {
        // SAFETY: reads a number.
        let delay = || unsafe { libmimalloc_sys::mi_option_get(PURGE_DELAY) };
        // The default, by which the option is known to be the one that is meant, or what another test's proxy has set.
        assert!([1000, SERVING].contains(&delay()), "{}", delay());
        Allocator.begin();
        assert_eq!(delay(), 0);
        Allocator.serve();
        assert_eq!(delay(), SERVING);
    }

    #[test]
    fn forgetting_start_up_pages_leaves_the_program_running() {
        assert!(forget_startup_pages() > 100_000);
        collect_memory();
        assert_eq!(format!("{:?}", std::time::Duration::from_millis(1500)), "1.5s");
    }
}

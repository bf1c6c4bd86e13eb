//! A middleman between a proxy and its cache, who can cut their links, let them stall, and lose what is said.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::old_listener;

/// See above. A clone is the same one.
#[derive(Clone)]
pub struct Middleman {
    pub port: u16,
    it: Arc<State>,
}

#[derive(Default)]
struct State {
    down: AtomicBool,
    deaf: AtomicBool,
    accepted: AtomicUsize,
    // Each of the next links is cut when so many bytes have come from the proxy.
    cuts: Mutex<VecDeque<u64>>,
    links: Mutex<Vec<Link>>,
}

struct Link {
    near: TcpStream,
    far: TcpStream,
    /// The far end outlives the near one.
    half: Arc<AtomicBool>,
    /// What still goes through, to the cache and from it.
    left: [Arc<AtomicU64>; 2],
}

impl Middleman {
    pub fn new(to: u16) -> Self {
        let (listener, port) = old_listener();
        let it = Self { port, it: Arc::default() };
        let of_it = it.clone();
        std::thread::spawn(move || of_it.run(&listener, to));
        it
    }

    fn run(&self, listener: &TcpListener, to: u16) {
        for near in listener.incoming() {
            let near = near.unwrap();
            if self.it.down.load(Ordering::SeqCst) {
                continue;
            }
            let Ok(far) = TcpStream::connect(("127.0.0.1", to)) else { continue };
            let half = Arc::new(AtomicBool::new(false));
            let clone = |end: &TcpStream| end.try_clone().unwrap();
            for end in [&near, &far] {
                end.set_nodelay(true).unwrap();
            }
            let cut = self.it.cuts.lock().unwrap().pop_front().unwrap_or(u64::MAX);
            let left = [Arc::new(AtomicU64::new(cut)), Arc::new(AtomicU64::new(u64::MAX))];
            let [up, down] = left.clone();
            let link = Link { near: clone(&near), far: clone(&far), half: half.clone(), left };
            self.it.links.lock().unwrap().push(link);
            let (near2, far2) = (clone(&near), clone(&far));
            let (it, it2, half2) = (self.it.clone(), self.it.clone(), half.clone());
            std::thread::spawn(move || it.carry(near, far, &half, &up, &AtomicBool::new(false)));
            std::thread::spawn(move || it2.carry(far2, near2, &half2, &down, &it2.deaf));
            self.it.accepted.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Each of the next links is cut when so many bytes have come from the proxy.
    pub fn cut_after(&self, bytes: &[u64]) {
        self.it.cuts.lock().unwrap().extend(bytes);
    }

    /// The links that there are are cut when so many more bytes have come from the proxy, or from the cache.
    pub fn cut_this_after(&self, up: u64, down: u64) {
        for link in self.it.links.lock().unwrap().iter() {
            link.left[0].store(up, Ordering::SeqCst);
            link.left[1].store(down, Ordering::SeqCst);
        }
    }

    /// How many links there have been.
    pub fn links(&self) -> usize {
        self.it.accepted.load(Ordering::SeqCst)
    }

    /// Nobody gets through, or somebody does again.
    pub fn down(&self, down: bool) {
        self.it.down.store(down, Ordering::SeqCst);
    }

    /// Nothing that the cache says arrives.
    pub fn deaf(&self, deaf: bool) {
        self.it.deaf.store(deaf, Ordering::SeqCst);
    }

    pub fn cut(&self) {
        for link in self.it.links.lock().unwrap().drain(..) {
            for end in [link.near, link.far] {
                let _ = end.shutdown(Shutdown::Both);
            }
        }
    }

    /// The proxy loses its link, of which the cache hears nothing.
    pub fn cut_half(&self) {
        for link in self.it.links.lock().unwrap().iter() {
            link.half.store(true, Ordering::SeqCst);
            let _ = link.near.shutdown(Shutdown::Both);
        }
    }
}

impl State {
    // To the cut, if there is one. `deaf`: what is said gets lost, as if the network had swallowed it.
    fn carry(
        &self,
        mut from: TcpStream,
        mut to: TcpStream,
        half: &AtomicBool,
        left: &AtomicU64,
        deaf: &AtomicBool,
    ) {
        let mut block = vec![0; 64 * 1024];
        while let Ok(n @ 1..) = from.read(&mut block) {
            if deaf.load(Ordering::SeqCst) {
                continue;
            }
            let may = left.load(Ordering::SeqCst).min(n as u64) as usize;
            if to.write_all(&block[..may]).is_err() || may < n {
                break;
            }
            left.fetch_sub(n as u64, Ordering::SeqCst);
        }
        if !half.load(Ordering::SeqCst) {
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
        }
    }
}

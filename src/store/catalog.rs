//! The index of one session: which complete image stands under which name.

use std::collections::{HashMap, HashSet};

use super::{Bodies, BodyId};
use crate::wire::{Key, criu};

/// The image without which a dump is not one: CRIU writes it last and reads it first.
pub const INVENTORY: &[u8] = b"inventory.img";
/// The tree of processes. A `criu pre-dump` or `criu cpuinfo dump` writes none.
pub const PSTREE: &[u8] = b"pstree.img";
/// The list of snapshot ids (remote dialect), under one of [`LIST_IDS`].
const LIST: &[u8] = b"parent";
/// The snapshot ids under which the list goes: that of 2019, that of 2017.
const LIST_IDS: [&[u8]; 2] = [b"", b"null"];
/// A list longer than this is not taken for one. An entry is at most a path.
const LIST_MAX: u64 = 1 << 20;

/// A complete image: the first `len` bytes of a body. (The body may be growing: an append in progress.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Image {
    /// The body that holds it.
    pub body: BodyId,
    /// How many bytes of the body are the image.
    pub len: u64,
    /// Whether the bytes are here. If not (they went on to the peer and were not to stay), `body` is empty.
    pub kept: bool,
    // When it was first complete, counted in images: the order to send a session in.
    order: u64,
}

/// All complete images of a session. It holds their bodies until [`Catalog::clear`].
#[derive(Debug, Default)]
pub struct Catalog {
    images: HashMap<Key, Image>,
    snapshots: HashSet<Box<[u8]>>,
    count: u64,
    bytes: u64,
    /// Whether CRIU's action script has announced this session's CRIU.
    pub scripted: bool,
}

impl Catalog {
    /// The image, if it is complete.
    pub fn get(&self, key: &Key) -> Option<Image> {
        self.images.get(key).copied()
    }

    /// The image is complete now: all of `body`, of which the caller gives its hold to the index. What
    /// stood under the name is replaced; its readers keep what they hold.
    pub fn complete(&mut self, key: Key, body: BodyId, bodies: &mut Bodies) -> Image {
        bodies.settle(body);
        let len = bodies.len(body);
        self.put(key, Image { body, len, kept: true, order: 0 }, bodies)
    }

    /// The image is complete, and has gone on to the peer: only its size is known here.
    pub fn passed(&mut self, key: Key, len: u64, bodies: &mut Bodies) {
        let body = bodies.create();
        self.put(key, Image { body, len, kept: false, order: 0 }, bodies);
    }

    /// The peer has the image: its bytes need not stay here.
    pub fn forget(&mut self, key: &Key, body: BodyId, bodies: &mut Bodies) {
        if let Some(image) = self.images.get_mut(key)
            && image.body == body
        {
            image.body = bodies.create();
            image.kept = false;
            bodies.release(body);
        }
    }

    fn put(&mut self, key: Key, mut image: Image, bodies: &mut Bodies) -> Image {
        self.count += 1;
        image.order = self.count;
        self.bytes += image.len;
        if !self.snapshots.contains(&key.snapshot_id) {
            self.snapshots.insert(key.snapshot_id.clone());
        }
        if let Some(old) = self.images.insert(key, image) {
            self.bytes -= old.len;
            bodies.release(old.body);
        }
        image
    }

    /// Whether there is any image of this snapshot.
    pub fn has_snapshot(&self, id: &[u8]) -> bool {
        self.snapshots.contains(id)
    }

    /// Whether there is an image whose bytes are not here.
    pub fn is_partial(&self) -> bool {
        self.images.values().any(|image| !image.kept)
    }

    /// How many images there are.
    pub fn len(&self) -> usize {
        self.images.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.images.is_empty()
    }

    /// How many bytes all images have together.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The names of all images, in no order.
    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        self.images.keys()
    }

    /// All images in the order in which they became complete.
    pub fn in_order(&self) -> Vec<(&Key, Image)> {
        let mut all: Vec<_> = self.images.iter().map(|(key, image)| (key, *image)).collect();
        all.sort_unstable_by_key(|(_, image)| image.order);
        all
    }

    /// Gives up all images.
    pub fn clear(&mut self, bodies: &mut Bodies) {
        for (_, image) in std::mem::take(&mut self.images) {
            bodies.release(image.body);
        }
        *self = Self::default();
    }

    /// Whether this is a complete dump of the stream dialect; if not, the sentence that says why.
    pub fn check_stream(&self) -> Result<(), String> {
        let has = |name: &[u8]| self.images.contains_key(&Key::stream(name));
        if !has(INVENTORY) {
            Err(format!("the dump ended without a complete inventory.img, after {} images", self.len()))
        } else if !has(PSTREE) {
            Err("there is no pstree.img: this was no dump of processes (criu pre-dump and criu cpuinfo \
                 dump are no use with --stream)"
                .into())
        } else {
            Ok(())
        }
    }

    /// Whether this is a complete dump, of whichever dialect it is: images of the remote dialect belong to
    /// a snapshot with a name. (The end of a link does not always tell: an ssh tunnel makes an orderly one
    /// of a reset.)
    pub fn check(&self, bodies: &Bodies) -> Result<(), String> {
        let mut others = self.keys().filter(|key| !is_list(key)).peekable();
        if others.peek().is_some() && others.all(|key| key.snapshot_id.is_empty()) {
            return self.check_stream();
        }
        self.check_remote(bodies)
    }

    /// Whether the last dump of the remote dialect is complete: where the image `parent` is a list of
    /// ids, its last one needs an inventory.img. (Old CRIU finishes a failed dump as it does a good one.)
    pub fn check_remote(&self, bodies: &Bodies) -> Result<(), String> {
        match self.last_snapshot(bodies) {
            Some(id) if !self.images.contains_key(&Key::new(id.clone(), INVENTORY)) => {
                Err(format!("the dump {} ended without a complete inventory.img", id.escape_ascii()))
            }
            _ => Ok(()),
        }
    }

    /// The ids of the dumps in the list of the remote dialect, in their order.
    pub fn snapshots(&self, bodies: &Bodies) -> Vec<Vec<u8>> {
        let lists = LIST_IDS.iter().filter_map(|id| self.get(&Key::new(*id, LIST)));
        let ids = |list: Image| {
            if list.len > LIST_MAX {
                return None;
            }
            criu::decode_snapshot_ids(&bodies.range(list.body, 0, list.len).ok()?)
                .filter(|ids| !ids.is_empty())
        };
        lists.filter_map(ids).next().unwrap_or_default()
    }

    /// The id of the last of them.
    pub fn last_snapshot(&self, bodies: &Bodies) -> Option<Vec<u8>> {
        self.snapshots(bodies).pop()
    }

    /// The page images that a restore has to ask for: those of the last dump.
    pub fn pages(&self, bodies: &Bodies) -> Vec<&Key> {
        let last = self.last_snapshot(bodies);
        let wanted =
            |key: &&Key| is_pages(key) && last.as_ref().is_none_or(|id| key.snapshot_id[..] == id[..]);
        self.images.keys().filter(wanted).collect()
    }
}

/// Whether this image holds memory: nearly all of a dump's bytes.
pub fn is_pages(key: &Key) -> bool {
    key.name.starts_with(b"pages-") && key.name.ends_with(b".img")
}

/// Whether this is the list of snapshots of the remote dialect. Each dump begins by appending to it.
pub fn is_list(key: &Key) -> bool {
    key.name[..] == *LIST && LIST_IDS.contains(&&key.snapshot_id[..])
}

/// Whether the image may yet change, or must not be read, while its session goes on: the list of
/// snapshots grows with each dump; inventory.img of the stream dialect lets the restore begin, and only the
/// end of the session tells that the dump was not aborted.
pub fn waits_for_the_end(key: &Key) -> bool {
    is_list(key) || (key.name[..] == *INVENTORY && key.snapshot_id.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame;

    fn add(catalog: &mut Catalog, bodies: &mut Bodies, key: Key, bytes: &[u8]) {
        let body = bodies.create();
        bodies.append(body, bytes).unwrap();
        catalog.complete(key, body, bodies);
    }

    fn list(ids: &[&[u8]]) -> Vec<u8> {
        let entry = |id: &&[u8]| frame::encode(&criu::SnapshotIdEntry { snapshot_id: Some(id.to_vec()) });
        ids.iter().flat_map(entry).collect()
    }

    #[test]
    fn replaced_images_leave_nothing_behind() {
        let (mut catalog, mut bodies) = (Catalog::default(), Bodies::new(1));
        let key = Key::new(*b"d", *b"a");
        add(&mut catalog, &mut bodies, key.clone(), b"first");
        let old = catalog.get(&key).unwrap();
        bodies.hold(old.body);
        add(&mut catalog, &mut bodies, key.clone(), b"new");
        assert_eq!((catalog.len(), catalog.bytes()), (1, 3));
        assert_eq!(bodies.range(old.body, 0, 5).unwrap(), b"first", "a reader keeps what it began with");
        bodies.release(old.body);
        catalog.clear(&mut bodies);
        assert_eq!(bodies.count(), 0);
    }

    #[test]
    fn a_stream_dump_needs_its_inventory_and_its_tree() {
        let (mut catalog, mut bodies) = (Catalog::default(), Bodies::new(1));
        add(&mut catalog, &mut bodies, Key::stream(*b"core-1.img"), b"x");
        assert!(catalog.check_stream().unwrap_err().contains("inventory.img"));
        add(&mut catalog, &mut bodies, Key::stream(INVENTORY), b"x");
        assert!(catalog.check_stream().unwrap_err().contains("pre-dump"));
        add(&mut catalog, &mut bodies, Key::stream(PSTREE), b"x");
        assert_eq!(catalog.check_stream(), Ok(()));
    }

    #[test]
    fn the_dialect_of_a_dump_is_seen_in_its_names() {
        let (mut catalog, mut bodies) = (Catalog::default(), Bodies::new(1));
        add(&mut catalog, &mut bodies, Key::new(*b"", LIST), &list(&[b"/d"]));
        assert!(catalog.check(&bodies).unwrap_err().contains("/d"));
        add(&mut catalog, &mut bodies, Key::new(*b"/d", INVENTORY), b"x");
        assert_eq!(catalog.check(&bodies), Ok(()));
        catalog.clear(&mut bodies);
        add(&mut catalog, &mut bodies, Key::stream(PSTREE), b"x");
        assert!(catalog.check(&bodies).unwrap_err().contains("inventory.img"));
        add(&mut catalog, &mut bodies, Key::stream(INVENTORY), b"x");
        assert_eq!(catalog.check(&bodies), Ok(()));
    }

    #[test]
    fn the_last_dump_of_a_series_counts() {
        for id in LIST_IDS {
            let (mut catalog, mut bodies) = (Catalog::default(), Bodies::new(1));
            let parent = Key::new(id, LIST);
            assert_eq!(catalog.check_remote(&bodies), Ok(()), "without a list nothing is known");
            add(&mut catalog, &mut bodies, parent.clone(), &list(&[b"/pre"]));
            assert!(catalog.check_remote(&bodies).is_err());
            add(&mut catalog, &mut bodies, Key::new(*b"/pre", INVENTORY), b"x");
            add(&mut catalog, &mut bodies, Key::new(*b"/pre", *b"pages-1.img"), b"x");
            assert_eq!(catalog.check_remote(&bodies), Ok(()));
            add(&mut catalog, &mut bodies, parent.clone(), &list(&[b"/pre", b"/final"]));
            assert!(catalog.check_remote(&bodies).unwrap_err().contains("/final"));
            add(&mut catalog, &mut bodies, Key::new(*b"/final", *b"pages-1.img"), b"x");
            assert_eq!(catalog.pages(&bodies), [&Key::new(*b"/final", *b"pages-1.img")]);
            add(&mut catalog, &mut bodies, parent, b"no list");
            assert_eq!(catalog.check_remote(&bodies), Ok(()));
            assert_eq!(catalog.pages(&bodies).len(), 2);
        }
    }
}

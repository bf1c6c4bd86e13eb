//! A chain of two snapshots, made of one dump. Where the kernel does not track memory, CRIU can't make one; here its
//! images are rewritten as `criu pre-dump` and `criu dump --prev-images-dir ../1` would have left them.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::Path;

use criu_relay::wire::frame;
use prost::Message;

const PAGE: usize = 4096;

/// Behind these many pages of one mapping, the next are in the other snapshot.
const RUN: u64 = 3;

// flags: where the pages of an entry are.
const IN_PARENT: u32 = 1;
const PRESENT: u32 = 4;

/// The bytes before the first object: two magic numbers.
const MAGIC: usize = 8;

#[derive(Clone, PartialEq, Message)]
struct PagemapHead {
    #[prost(uint32, optional, tag = "1")]
    pages_id: Option<u32>,
}

// CRIU 4.2 has the number of pages twice, or what came before it and is narrower.
#[derive(Clone, PartialEq, Message)]
struct PagemapEntry {
    #[prost(uint64, optional, tag = "1")]
    vaddr: Option<u64>,
    #[prost(uint32, optional, tag = "2")]
    compat_nr_pages: Option<u32>,
    #[prost(bool, optional, tag = "3")]
    in_parent: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    flags: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    nr_pages: Option<u64>,
}

impl PagemapEntry {
    fn pages(&self) -> u64 {
        self.nr_pages.or(self.compat_nr_pages.map(u64::from)).expect("an entry has its number of pages")
    }

    /// So many of its pages, behind the first ones.
    fn part(&self, skipped: u64, pages: u64) -> Self {
        Self {
            vaddr: self.vaddr.map(|vaddr| vaddr + skipped * PAGE as u64),
            compat_nr_pages: self.compat_nr_pages.map(|_| pages as u32),
            nr_pages: self.nr_pages.map(|_| pages),
            ..self.clone()
        }
    }

    fn left_to_parent(&self) -> Self {
        Self { in_parent: Some(true), flags: Some(IN_PARENT), ..self.clone() }
    }
}

/// Images by name.
pub type Images = BTreeMap<String, Vec<u8>>;

/// The images that are files in a directory.
pub fn read(dir: &Path) -> Images {
    let entries = fs::read_dir(dir).expect("images can be listed").map(|entry| entry.expect("an entry"));
    let names = entries.map(|entry| entry.file_name().into_string().expect("a name in UTF-8"));
    let images = names.filter(|name| name.ends_with(".img"));
    images.map(|name| (name.clone(), fs::read(dir.join(name)).expect("an image can be read"))).collect()
}

/// Makes a directory of images, with a link to the one before, if there is one.
pub fn write(dir: &Path, images: &Images, parent: Option<&str>) {
    fs::DirBuilder::new().mode(0o700).create(dir).expect("a directory can be created");
    for (name, bytes) in images {
        fs::write(dir.join(name), bytes).expect("an image can be written");
    }
    if let Some(parent) = parent {
        symlink(parent, dir.join("parent")).expect("a link can be made");
    }
}

fn objects(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut objects = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk() {
        let (object, rest) = rest.split_at(u32::from_ne_bytes(*length) as usize);
        objects.push(object);
        bytes = rest;
    }
    objects
}

/// The two snapshots, in their order. The first has what a pre-dump has: every page as it was then, here of every
/// other run one that has changed since. The second has the changed ones, and everything that is not a page of a
/// process.
pub fn split(images: Images) -> [Images; 2] {
    let (mut first, mut second) = (Images::new(), images.clone());
    first.insert("inventory.img".into(), images["inventory.img"].clone());
    let is_of_process = |name: &str| {
        let pid = name.strip_prefix("pagemap-").and_then(|rest| rest.strip_suffix(".img"));
        pid.is_some_and(|pid| pid.parse::<u32>().is_ok())
    };
    for (name, map) in images.iter().filter(|(name, _)| is_of_process(name)) {
        let (magic, map) = map.split_at(MAGIC);
        let mut objects = objects(map).into_iter();
        let head = PagemapHead::decode(objects.next().expect("a pagemap has a head")).expect("a head");
        let pages_name = format!("pages-{}.img", head.pages_id.expect("a pagemap names its pages"));
        let mut pages = &images[&pages_name][..];
        let mut maps = [(); 2].map(|()| [magic, &frame::encode(&head)].concat());
        let mut bodies = [Vec::new(), Vec::new()];
        let mut has_changed = false;
        for object in objects {
            let entry = PagemapEntry::decode(object).expect("an entry of a pagemap");
            if entry.flags.is_some_and(|flags| flags & PRESENT == 0) {
                maps.iter_mut().for_each(|map| map.extend(frame::encode(&entry)));
                continue;
            }
            for begin in (0..entry.pages()).step_by(RUN as usize) {
                let run = entry.part(begin, RUN.min(entry.pages() - begin));
                let (bytes, rest) = pages.split_at(run.pages() as usize * PAGE);
                pages = rest;
                maps[0].extend(frame::encode(&run));
                if has_changed {
                    bodies[0].extend(bytes.iter().map(|byte| !byte));
                    maps[1].extend(frame::encode(&run));
                    bodies[1].extend(bytes);
                } else {
                    bodies[0].extend(bytes);
                    maps[1].extend(frame::encode(&run.left_to_parent()));
                }
                has_changed = !has_changed;
            }
        }
        assert_eq!(pages, [], "{pages_name} has pages that {name} does not know");
        for (images, (map, body)) in [&mut first, &mut second].into_iter().zip(maps.into_iter().zip(bodies)) {
            images.insert(name.clone(), map);
            images.insert(pages_name.clone(), body);
        }
    }
    [first, second]
}

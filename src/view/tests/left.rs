//! What was there before.

use super::*;

#[test]
fn links_to_a_cache_that_is_gone_are_replaced() {
    let place = Place::for_files();
    let mut view = place.view();
    let files = [
        dump(&mut view),
        vec![add(&mut view, "/d/1", "inventory.img", b"1"), add(&mut view, "/d/2", "inventory.img", b"2")],
    ];
    view.reveal(&[b"/d/1".to_vec(), b"/d/2".to_vec()]).unwrap();
    symlink("/proc/1/fd/3", place.dir.join(NEW)).unwrap();
    // As if it had been killed.
    std::mem::forget(view);
    assert!(place.names().len() > 8);
    for persist in [None, Some(Persist::Disk)] {
        let mut view = place.open(persist).unwrap();
        assert!(matches!(view.take_over(), Ok(Left::Nothing)));
        assert!(fs::read_dir(&place.dir).unwrap().next().is_none(), "{persist:?}: {:?}", place.names());
        drop(view);
        assert!(place.dir.exists(), "it was there before");
        for (at, name) in ["inventory.img", "x.img"].iter().enumerate() {
            symlink(format!("/proc/4194305/fd/{at}"), place.dir.join(name)).unwrap();
        }
    }
    drop(files);
}

/// What a cache that was killed has left in a view that outlives it.
fn left(make: impl Fn(&mut View)) -> Place {
    let place = Place::for_files();
    let mut view = place.persistent();
    let _files = dump(&mut view);
    make(&mut view);
    std::mem::forget(view);
    place
}

fn names(images: &[(Key, OwnedFd)]) -> Vec<String> {
    let mut names: Vec<_> = images.iter().map(|(key, _)| key.to_string()).collect();
    names.sort();
    names
}

fn read(images: &[(Key, OwnedFd)], name: &str) -> Vec<u8> {
    let (_, file) = images.iter().find(|(key, _)| key.name[..] == *name.as_bytes()).unwrap();
    let mut bytes = vec![0; 100];
    let n = rustix::io::pread(file, &mut bytes, 0).unwrap();
    bytes.truncate(n);
    bytes
}

#[test]
fn a_dump_that_was_never_complete_is_removed() {
    let place = left(|_| ());
    place.write("pages-9.img", b"more of it");
    place.write("notes", b"mine");
    place.write(NEW, b"half of one");
    let mut view = place.persistent();
    assert!(matches!(view.take_over(), Ok(Left::Nothing)) && !view.shows());
    assert_eq!(place.names(), ["notes"]);
    // Of snapshots too.
    let place = Place::for_files();
    let mut view = place.persistent();
    let files = ["/d/1", "/d/2"].map(|id| add(&mut view, id, "pages-1.img", b"pages"));
    std::mem::forget(view);
    assert!(matches!(place.persistent().take_over(), Ok(Left::Nothing)));
    assert!(fs::read_dir(&place.dir).unwrap().next().is_none());
    drop(files);
}

#[test]
fn a_complete_dump_is_taken_over() {
    let place = left(|view| view.reveal(&[]).unwrap());
    let mut view = place.persistent();
    let Ok(Left::Complete(images, false)) = view.take_over() else { panic!("it is not found") };
    assert_eq!(names(&images), ["inventory.img", "pages-1.img", "pstree.img"]);
    assert_eq!(
        (read(&images, "pages-1.img"), read(&images, "inventory.img")),
        (b"pages".into(), b"inventory".into())
    );
    assert!(view.shows());
    // It goes only when somebody says so.
    drop(view);
    assert_eq!(place.names(), ["inventory.img", "pages-1.img", "pstree.img"]);
    let mut view = place.persistent();
    view.take_over().unwrap();
    view.clear();
    assert!(place.names().is_empty());
}

#[test]
fn one_whose_source_has_not_decided_is_taken_over() {
    let place = left(|view| view.withhold(SESSION).unwrap());
    let mut view = place.persistent();
    let Ok(Left::Withheld(session, images)) = view.take_over() else { panic!("it is not found") };
    assert_eq!(session, SESSION);
    assert_eq!(names(&images), ["inventory.img", "pages-1.img", "pstree.img"]);
    assert_eq!(read(&images, "inventory.img"), b"inventory");
    assert!(!view.shows() && place.names()[..2] == [SCRIPTED.into(), withheld()]);
    view.reveal(&[]).unwrap();
    assert_eq!(place.names(), [SCRIPTED, "inventory.img", "pages-1.img", "pstree.img"]);
    view.take_back(SESSION).unwrap();
    drop(view);
    // As criu-relay resolve does it.
    assert!(reveal_withheld(&place.dir, [1; 16]).unwrap_err().contains("inventory.img can't be made"));
    reveal_withheld(&place.dir, SESSION).unwrap();
    // What it was is known without a record.
    let mut view = place.persistent();
    assert!(matches!(view.take_over(), Ok(Left::Complete(_, true))));
    view.clear();
    assert!(place.names().is_empty());
}

#[test]
fn what_is_said_of_a_dump_that_is_gone_goes() {
    let place = left(|view| {
        view.withhold(SESSION).unwrap();
        view.spend();
    });
    assert_eq!(place.names(), [SCRIPTED, "pages-1.img", "pstree.img"]);
    assert!(matches!(place.persistent().take_over(), Ok(Left::Nothing)));
    assert!(place.names().is_empty());
}

#[test]
fn what_can_not_be_gone_on_with_is_refused_and_left_alone() {
    let refused = |place: &Place, persist, why: &str| {
        let before = place.names();
        let said = place.open(persist).unwrap().take_over().unwrap_err();
        assert!(said.contains(why) && said.contains(&place.dir.display().to_string()), "{said}");
        assert_eq!(place.names(), before);
    };
    let disk = Some(Persist::Disk);
    // Files, for a view of links.
    for place in
        [left(|_| ()), left(|view| view.reveal(&[]).unwrap()), left(|view| view.withhold(SESSION).unwrap())]
    {
        refused(&place, None, "holds images that are files (");
    }
    // Only the inventory of a dump that waits for its word.
    let place = Place::for_files();
    DirBuilder::new().mode(0o700).create(&place.dir).unwrap();
    place.write(&withheld(), b"inventory");
    refused(&place, None, &withheld());
    // Two dumps.
    place.write(&format!(".inventory.img.{}", "cd".repeat(16)), b"another");
    refused(&place, disk, "holds what belongs to more than one dump");
    let place = left(|view| view.reveal(&[]).unwrap());
    place.write(&withheld(), b"another");
    refused(&place, disk, "holds what belongs to more than one dump");
    // Snapshots of the remote dialect.
    let place = Place::for_files();
    let mut view = place.persistent();
    let files = ["/d/1", "/d/2"].map(|id| add(&mut view, id, "inventory.img", b"1"));
    view.reveal(&[b"/d/1".to_vec(), b"/d/2".to_vec()]).unwrap();
    std::mem::forget(view);
    refused(&place, disk, "holds the snapshots of an earlier dump of criu --remote");
    drop(files);
}

#[test]
fn links_are_told_from_others() {
    for target in ["/proc/1/fd/3", "/proc/12345/fd/0"] {
        assert!(is_link(target), "{target}");
    }
    let others = [
        "",
        "/",
        "proc/1/fd/3",
        "/proc/self/fd/3",
        "/proc/1/fd/",
        "/proc/1/fd/3/x",
        "/proc//1/fdx/3",
        "/sys/1/fd/3",
    ];
    for target in others {
        assert!(!is_link(target), "{target}");
    }
}

fn is_link(target: &str) -> bool {
    crate::view::left::is_descriptor(Path::new(target))
}

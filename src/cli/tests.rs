use super::*;
use crate::peer::Prepare;

fn options(args: &str) -> Result<Options, String> {
    match parse(args.split_whitespace().map(OsString::from))? {
        Command::Run(options) => Ok(*options),
        other => panic!("{other:?}"),
    }
}

#[test]
fn defaults() {
    let proxy = options("proxy").unwrap();
    assert_eq!((proxy.address.as_str(), proxy.port), ("localhost", 9996));
    assert_eq!(proxy.images_dirs, [PathBuf::from(".")]);
    assert_eq!(proxy.connect_timeout, Duration::from_secs(30));
    let cache = options("image-cache -D /a --images-dir /b").unwrap();
    assert_eq!((cache.verb, cache.address.as_str()), (Verb::Cache, "127.0.0.1"));
    assert_eq!(cache.work_dir, PathBuf::from("/a"));
    assert_eq!(cache.images_dirs.len(), 2);
}

#[test]
fn verbosity() {
    for (args, level) in [("-v", 2), ("-vv", 3), ("-v2", 2), ("-v0", 0), ("-v -v", 3), ("--verbosity=3", 3)] {
        assert_eq!(options(&format!("proxy {args}")).unwrap().verbosity, level, "{args}");
    }
    assert!(options("proxy -vx").is_err());
}

#[test]
fn sizes() {
    for (text, bytes) in
        [("1048576", 1 << 20), ("1024K", 1 << 20), ("1M", 1 << 20), ("64m", 64 << 20), ("3G", 3 << 30)]
    {
        let cache = options(&format!("cache --memory-limit {text} --spill-dir /d")).unwrap();
        assert_eq!(cache.memory_limit, Some(bytes), "{text}");
        assert_eq!(cache.spill_dir, Some(PathBuf::from("/d")));
    }
    assert_eq!(options("proxy --memory-limit 2G").unwrap().memory_limit, Some(2 << 30));
}

#[test]
fn mistakes() {
    for args in [
        "",
        "relay",
        "proxy cache",
        "proxy --port",
        "proxy --port 65536",
        "proxy --port 0",
        "proxy --nonsense",
        "proxy -x",
        "proxy --allow-peer any",
        "cache --allow-peer 10.0.0.0/64",
        "proxy --ps-socket -1",
        "proxy --ps-socket x",
        "proxy --ps-socket 3 --status-fd 3",
        "proxy --ps-socket 3 --address host",
        "proxy --keep=yes",
        "proxy --connect-timeout -3",
        "proxy --connect-timeout 0",
        "proxy --reconnect -1",
        "proxy --reconnect 3601",
        "proxy --reconnect 3 --splice always",
        "proxy --reconnect 3 --peer-protocol seed",
        "proxy --reconnect 3 --ps-socket 3",
        "cache --reconnect 3",
        "cache --replay-buffer 3M",
        "proxy --replay-buffer 1023K",
        "proxy --replay-buffer M",
        "proxy --replay-buffer +3M",
        "proxy --replay-buffer 3T",
        "proxy --replay-buffer 99999999999G",
        "cache --memory-limit 1023K",
        "cache --memory-limit 0",
        "cache --memory-limit -1M",
        "cache --memory-limit +1M",
        "cache --memory-limit 1T",
        "cache --memory-limit M",
        "cache --memory-limit 1.5G",
        "cache --memory-limit 99999999999G",
        "proxy --spill-dir /d",
        "proxy --view /v",
        "proxy --persist",
        "cache --view",
        "cache --persist",
        "cache --persist=disk",
        "cache --view /v --persist=tmpfs",
        "cache --view /v --persist=",
        "cache --view /v --persist disk",
        "cache --view /v --spill-dir /d",
        "cache --view /v --persist --spill-dir /d",
        "cache --timeout 3",
        "proxy --ready",
    ] {
        assert!(options(args).is_err(), "{args}");
    }
}

#[test]
fn resolving() {
    let resolve = |args: &str| match parse(args.split_whitespace().map(OsString::from)) {
        Ok(Command::Resolve(resolve)) => Ok((resolve.decision, resolve.session, resolve.work_dir)),
        Ok(other) => panic!("{other:?}"),
        Err(why) => Err(why),
    };
    let dir = PathBuf::from;
    assert_eq!(resolve("resolve"), Ok((None, None, dir("."))));
    assert_eq!(resolve("-W /a resolve -v commit"), Ok((Some(Decision::Commit), None, dir("/a"))));
    let named = Ok((Some(Decision::Rollback), Some("ab".into()), dir("/a")));
    assert_eq!(resolve("resolve rollback ab --work-dir /a"), named);
    for args in
        ["resolve x", "resolve commit a b", "resolve -D /a", "--keep resolve", "resolve --commit stored"]
    {
        assert!(resolve(args).is_err(), "{args}");
    }
}

#[test]
fn views() {
    for (args, persist) in [
        ("--view /v", None),
        ("--view /v --persist", Some(Persist::Tmpfs)),
        ("--persist=disk --view=/v", Some(Persist::Disk)),
        ("--persist --view /v --memory-limit 1M --keep", Some(Persist::Tmpfs)),
    ] {
        let view = options(&format!("cache {args}")).unwrap().view;
        assert_eq!(view, Some(View { dir: PathBuf::from("/v"), persist }), "{args}");
    }
    assert_eq!(options("cache").unwrap().view, None);
    let why = options("cache --view /v --spill-dir /d").unwrap_err();
    assert!(why.contains("an image in a view is one file"), "{why}");
}

#[test]
fn waiting() {
    let wait = |args: &str| match parse(args.split_whitespace().map(OsString::from)) {
        Ok(Command::Wait(wait)) => {
            let timeout = wait.timeout.map(|timeout| timeout.as_secs());
            Ok((wait.images_dir, timeout, wait.ready, wait.verbosity))
        }
        Ok(other) => panic!("{other:?}"),
        Err(why) => Err(why),
    };
    let dir = PathBuf::from;
    assert_eq!(wait("wait"), Ok((dir("."), None, false, 1)));
    assert_eq!(wait("wait -D /a --timeout 3 -v"), Ok((dir("/a"), Some(3), false, 2)));
    assert_eq!(wait("--ready --images-dir /a wait"), Ok((dir("/a"), None, true, 1)));
    for args in [
        "wait x",
        "wait cache",
        "wait resolve",
        "resolve wait",
        "cache wait",
        "wait -D",
        "wait -D /a -D /b",
        "wait -W /a",
        "wait --timeout 0",
        "wait --timeout 1.5",
        "wait --timeout -1",
        "wait --timeout",
        "wait --ready=yes",
        "wait --view /a",
        "wait --keep",
        "--port 3 wait",
        "resolve --ready",
        "resolve --timeout 3",
    ] {
        assert!(wait(args).is_err(), "{args}");
    }
}

#[test]
fn links_that_come_back() {
    for (args, reconnect, buffer) in [
        ("", None, 64 << 20),
        ("--reconnect 0", None, 64 << 20),
        ("--reconnect 10 --replay-buffer 1048576", Some(10), 1 << 20),
        ("--reconnect 3600 --replay-buffer 2048K", Some(3600), 2 << 20),
        ("--reconnect 1 --replay-buffer 3M", Some(1), 3 << 20),
        ("--replay-buffer 2G", None, 2 << 30),
    ] {
        let policy = options(&format!("proxy {args}")).unwrap().policy;
        assert_eq!(policy.reconnect, reconnect.map(Duration::from_secs), "{args}");
        assert_eq!(policy.replay_buffer, buffer, "{args}");
    }
}

#[test]
fn memory_that_is_prepared() {
    for (args, prepare) in [
        ("", Prepare::Auto),
        ("--prepare auto", Prepare::Auto),
        ("--prepare off", Prepare::Off),
        ("--prepare 0", Prepare::Off),
        ("--prepare 3G", Prepare::Size(3 << 30)),
    ] {
        for verb in ["proxy", "cache"] {
            assert_eq!(options(&format!("{verb} {args}")).unwrap().policy.prepare, prepare, "{verb} {args}");
        }
    }
    let timeout = |args| options(args).map(|options| options.policy.prepare_timeout);
    assert_eq!(timeout("proxy"), Ok(Duration::from_secs(30)));
    assert_eq!(timeout("proxy --prepare-timeout 5"), Ok(Duration::from_secs(5)));
    for args in
        ["cache --prepare-timeout 5", "proxy --prepare-timeout 0", "proxy --prepare", "cache --prepare on"]
    {
        assert!(options(args).is_err(), "{args}");
    }
}

#[test]
fn every_flag_of_the_table_is_understood() {
    for flag in FLAGS {
        let value = match flag.long {
            "allow-peer" => "any",
            "address" => "host",
            "peer-protocol" => "relay",
            "commit" => "stored",
            "splice" => "never",
            "retain" => "small",
            "replay-buffer" => "3M",
            "memory-limit" => "1M",
            _ => "3",
        };
        let verb = match flag.long {
            "allow-peer" | "consume" | "spill-dir" | "view" => "cache",
            "persist" => "cache --view /v",
            "timeout" | "ready" => "wait",
            _ => "proxy",
        };
        let mut args: Vec<_> = verb.split_whitespace().map(String::from).collect();
        args.push(format!("--{}", flag.long));
        match flag.value {
            Some(value) if value.starts_with('[') => {}
            Some(_) => args.push(value.into()),
            None => {}
        }
        assert!(parse(args.into_iter().map(OsString::from)).is_ok(), "--{}", flag.long);
    }
    let help = help();
    assert!(help.lines().all(|line| line.chars().count() <= 110));
    assert!(FLAGS.iter().all(|flag| help.contains(&format!("--{}", flag.long))));
}

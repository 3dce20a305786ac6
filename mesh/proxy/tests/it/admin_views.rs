//! What the admin port shows of the configuration, where tools look for it; and the documented example.

use std::net::SocketAddr;

use serin_proxy::control::admin::{AdminPort, Port};
use tokio_util::sync::CancellationToken;

use crate::fixture::*;
use crate::interop::wait_for;
use crate::statistics::{backend, config, idle_clusters};
use crate::twins::{Place, Started};

#[tokio::test]
async fn the_dump_tells_the_bootstrap_and_what_is_of_it_apart_from_what_came_later() {
    let (place, backend) = (Place::with(3).await, backend().await);
    let admin = place.admin;
    let started = Started::from(&config(&place, backend), admin).await;
    let cluster = serin_xds::pb::envoy::config::cluster::v3::Cluster {
        name: "later".into(),
        ..Default::default()
    };
    let body = prost::Message::encode_to_vec(&cluster);
    let update = serin_proxy::config::store::Update {
        name: "later",
        body: &body,
    };
    assert!(
        started
            .proxy
            .apply(serin_xds::ResourceType::Cluster, &[update], &[])
            .await
            .is_empty()
    );
    let dump: serde_json::Value =
        serde_json::from_str(&get(admin, "/config_dump?include_eds").await.2).unwrap();
    let section = |kind: &str| {
        let name = format!("type.googleapis.com/envoy.admin.v3.{kind}ConfigDump");
        let sections = dump["configs"].as_array().unwrap();
        sections
            .iter()
            .find(|section| section["@type"] == name)
            .unwrap()
            .clone()
    };
    let names = |list: &serde_json::Value, field: &str| -> Vec<String> {
        let entries = list.as_array().unwrap().iter();
        entries
            .map(|entry| entry[field]["name"].as_str().unwrap().to_owned())
            .collect()
    };
    let bootstrap = section("Bootstrap");
    assert_eq!(bootstrap["bootstrap"]["node"]["id"], "counted");
    assert_eq!(
        bootstrap["bootstrap"]["admin"]["address"]["socket_address"]["port_value"],
        u64::from(admin.port())
    );
    assert_eq!(
        bootstrap["bootstrap"]["static_resources"]["listeners"]
            .as_array()
            .unwrap()
            .len(),
        3
    );
    assert!(bootstrap["last_updated"].as_str().unwrap().ends_with('Z'));
    let clusters = section("Clusters");
    assert_eq!(names(&clusters["static_clusters"], "cluster").len(), 15);
    assert!(clusters["static_clusters"][0]["version_info"].is_null());
    assert_eq!(names(&clusters["dynamic_active_clusters"], "cluster"), ["later"]);
    assert_eq!(
        names(&section("Listeners")["static_listeners"], "listener"),
        ["http", "tcp", "unmatched"]
    );
    assert_eq!(
        names(&section("Routes")["static_route_configs"], "route_config"),
        ["main"]
    );
    let endpoints = section("Endpoints");
    assert_eq!(
        endpoints["static_endpoint_configs"][0]["endpoint_config"]["cluster_name"],
        "breaks"
    );
    let listeners: serde_json::Value = serde_json::from_str(
        &get(admin, "/config_dump?resource=static_listeners&name_regex=tcp")
            .await
            .2,
    )
    .unwrap();
    assert_eq!(listeners["configs"].as_array().unwrap().len(), 1);
    started.stop().await;
}

#[tokio::test]
async fn the_admin_port_answers_as_envoys_does_where_tools_look() {
    let admin = free_port().await;
    let started = Started::from(&idle_clusters(1, ""), admin).await;
    let help = get(admin, "/help").await.2;
    assert!(help.starts_with("admin commands are:\n  /: "), "{help}");
    assert!(
        help.contains("\n  /quitquitquit (POST): ") && help.contains("\n      usedonly: "),
        "{help}"
    );
    let (status, _, text) = get(admin, "/nothing").await;
    assert_eq!((status, text), (404, format!("invalid path. {help}")));
    let (status, _, text) = get(admin, "/quitquitquit").await;
    assert_eq!((status, &*text), (405, "Method GET not allowed, POST required."));
    assert_eq!(get(admin, "/hot_restart_version").await.2, "serin.1");
    assert_eq!(get(admin, "/init_dump").await.2, "{}\n");
    let info: serde_json::Value = serde_json::from_str(&get(admin, "/server_info").await.2).unwrap();
    assert_eq!(info["version"].as_str().unwrap().split('/').count(), 5);
    assert_eq!(info["node"]["id"], "idle");
    assert_eq!(info["node"]["user_agent_name"], "serin-proxy");
    for option in [
        "concurrency",
        "config_path",
        "log_level",
        "drain_time",
        "mode",
        "disable_hot_restart",
    ] {
        assert!(!info["command_line_options"][option].is_null(), "{option}");
    }
    started.stop().await;
}

#[tokio::test]
async fn what_is_waited_for_before_readiness_is_told() {
    let harness = Harness::start();
    let port = AdminPort::bind(&harness.proxy, "127.0.0.1:0".parse().unwrap(), Port::Admin).unwrap();
    let admin = port.address().unwrap();
    let cancel = CancellationToken::new();
    tokio::spawn(port.serve(harness.proxy.clone(), CancellationToken::new(), cancel.clone()));
    harness
        .put(serin_xds::ResourceType::Cluster, "c", &eds_cluster("c"))
        .await;
    let dump: serde_json::Value = serde_json::from_str(&get(admin, "/init_dump").await.2).unwrap();
    assert_eq!(
        dump["unready_targets_dumps"],
        serde_json::json!([{ "name": "server", "target_names": ["endpoints c"] }])
    );
    assert_eq!(get(admin, "/init_dump?mask=listener").await.2, "{}\n");
    cancel.cancel();
}

#[tokio::test]
async fn the_documented_example_runs_alone_and_its_commands_say_what_the_document_says() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
    let document = std::fs::read_to_string(format!("{root}/docs/supported/proxy.md")).unwrap();
    let mut example = std::fs::read_to_string(format!("{root}/mesh/proxy/example/bootstrap.yaml")).unwrap();
    let commands: Vec<(String, String)> = document
        .lines()
        .filter(|line| line.starts_with("curl "))
        .filter_map(|line| line.split_once(" # "))
        .map(|(command, says)| (command.trim().to_owned(), says.trim().to_owned()))
        .collect();
    assert!(commands.len() >= 5, "{commands:?}");
    let (v1, v2) = (Backend::named("one").await, Backend::named("two").await);
    let ports = [
        ("8080", free_port().await.port()),
        ("15000", free_port().await.port()),
        ("9081", v1.address.port()),
        ("9082", v2.address.port()),
    ];
    let moved = |text: &str| {
        let mut text = text.to_owned();
        for (port, here) in ports {
            text = text.replace(port, &here.to_string());
        }
        text
    };
    example = moved(&example);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("example.yaml");
    std::fs::write(&path, example).unwrap();
    let mut child = tokio::process::Command::new(env!("CARGO_BIN_EXE_serin-proxy"))
        .args(["--concurrency", "1", "--config"])
        .arg(&path)
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    wait_for(SocketAddr::from(([127, 0, 0, 1], ports[0].1))).await;
    for (command, says) in commands {
        let run = tokio::process::Command::new("sh")
            .arg("-c")
            .arg(moved(&command))
            .output();
        let output = soon(&command, run).await.unwrap();
        if output.status.code() == Some(127) {
            eprintln!("SKIPPED: no curl");
            break;
        }
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains(&*moved(&says)), "{command}: {text}");
    }
    child.kill().await.unwrap();
}

//! Recorded protocol data of other projects (`../shared/data/http`) against the real listener.

use std::path::{Path, PathBuf};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::fixture::*;
use crate::frames::*;

/// The folder of the data, or nothing (said loudly).
fn data() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/http");
    if path.is_dir() {
        return Some(path);
    }
    eprintln!("SKIPPED: HTTP test data: ../shared is not here");
    None
}

fn files(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let mut out: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|have| have == ending))
        .collect();
    out.sort();
    out
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2)
        .map(|index| u8::from_str_radix(&text[index * 2..index * 2 + 2], 16).unwrap())
        .collect()
}

/// A vector of llhttp: what goes in, and what the parser saw.
struct Vector {
    title: String,
    lenient: bool,
    input: Vec<u8>,
    /// Whole messages.
    complete: usize,
    failed: bool,
    /// Body bytes of the whole messages.
    body: Vec<u8>,
}

fn expand(source: &str) -> Option<Vec<u8>> {
    let source = source.strip_suffix('\n').unwrap_or(source);
    let joined = source.replace("\\\n", "").replace('\n', "\r\n");
    if joined.contains("${") {
        return None;
    }
    let mut out = Vec::new();
    let mut rest = joined.as_bytes();
    while let [first, more @ ..] = rest {
        if *first != b'\\' || more.is_empty() {
            out.push(*first);
            rest = more;
            continue;
        }
        let (byte, used) = match more[0] {
            b'r' => (b'\r', 1),
            b'n' => (b'\n', 1),
            b't' => (b'\t', 1),
            b'f' => (0x0c, 1),
            b'x' => {
                let text = std::str::from_utf8(&more[1..3]).unwrap();
                (u8::from_str_radix(text, 16).unwrap(), 3)
            }
            b'0'..=b'7' => {
                let digits = more
                    .iter()
                    .take(3)
                    .take_while(|byte| (b'0'..=b'7').contains(byte))
                    .count();
                let text = std::str::from_utf8(&more[..digits]).unwrap();
                (u8::from_str_radix(text, 8).unwrap_or(0), digits)
            }
            _ => (b'\\', 0),
        };
        out.push(byte);
        rest = &more[used..];
    }
    Some(out)
}

fn vectors(path: &Path) -> Vec<Vector> {
    let text = std::fs::read_to_string(path).unwrap();
    let mut out = Vec::new();
    for section in text.split("\n## ").flat_map(|part| part.split("\n### ")).skip(1) {
        let title = section.lines().next().unwrap_or_default().to_owned();
        let fenced = |tag: &str| {
            let start = section.find(&format!("```{tag}\n"))? + tag.len() + 4;
            let end = section[start..].find("\n```").map(|end| start + end + 1)?;
            Some(&section[start..end])
        };
        let (Some(input), Some(log)) = (fenced("http"), fenced("log")) else {
            continue;
        };
        let Some(input) = expand(input) else { continue };
        let lenient = !section.contains("\"type\": \"request\"") || section.contains("\"mode\"");
        let mut body = Vec::new();
        let (mut complete, mut pending) = (0, Vec::new());
        for line in log.lines() {
            if line.ends_with("message complete") {
                complete += 1;
                body.append(&mut pending);
            } else if line.ends_with("message begin") {
                pending.clear();
            } else if line.contains("span[body]") {
                let number = |key: &str| -> usize {
                    let at = line.find(key).unwrap() + key.len();
                    line[at..].split(' ').next().unwrap().parse().unwrap()
                };
                let (off, len) = (number("off="), number("len="));
                pending.extend(input.get(off..off + len).unwrap_or_default());
            }
        }
        out.push(Vector {
            title,
            lenient,
            input,
            complete,
            failed: log.contains("error code="),
            body,
        });
    }
    out
}

/// Sends bytes and reads the answers: up to `expected`, then our side is closed and what else comes is read. The statuses,
/// and whether as many came as were expected: what is not whole is left waiting for a while only.
async fn statuses(at: std::net::SocketAddr, bytes: &[u8], expected: usize) -> (Vec<u16>, bool) {
    // Too short a time loses what could be compared, no more.
    let patience = std::time::Duration::from_millis(if expected == 0 { 100 } else { 1_500 });
    let count = |answer: &[u8]| answer.windows(7).filter(|window| *window == b"HTTP/1.").count();
    let mut stream = TcpStream::connect(at).await.unwrap();
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let mut waited = false;
    while expected == 0 || count(&answer) < expected {
        match tokio::time::timeout(patience, stream.read_buf(&mut answer)).await {
            Ok(Ok(read)) if read > 0 => {}
            Ok(_) => break,
            Err(_) => {
                waited = expected > 0;
                break;
            }
        }
    }
    let _ = stream.shutdown().await;
    let _ = soon("the end of the connection", stream.read_to_end(&mut answer)).await;
    let statuses = String::from_utf8_lossy(&answer)
        .split("HTTP/1.")
        .skip(1)
        // Behind the minor version, which is that of the request.
        .filter_map(|part| part.get(2..5)?.parse().ok())
        .collect();
    (statuses, !waited)
}

#[tokio::test]
async fn llhttp_vectors_are_never_taken_for_more_or_other_than_llhttp_takes_them() {
    let Some(data) = data() else { return };
    let harness = Harness::start();
    let mut backend = Backend::named("b").await;
    harness.cluster("c", &[backend.address]).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    let (mut seen, mut served) = (0, 0);
    for path in files(&data.join("llhttp/request"), "md") {
        for vector in vectors(&path) {
            // llhttp takes the methods that it knows; to us, as to RFC 9110 section 9.1, a method is any token.
            let methods = ["HTTP protocol and ANNOUNCE method", "Invalid method"];
            if vector.lenient || methods.contains(&vector.title.as_str()) {
                continue;
            }
            seen += 1;
            // Most vectors have no Host, which alone is a reason to refuse: once as it is, once with one.
            let mut with_host = vector.input.clone();
            if let Some(end) = with_host.windows(2).position(|pair| pair == b"\r\n") {
                with_host.splice(end + 2..end + 2, *b"Host: a\r\n");
            }
            for (input, changed) in [(&vector.input, false), (&with_host, true)] {
                let (answers, in_time) = statuses(at, input, vector.complete).await;
                let good = answers.iter().filter(|status| **status == 200).count();
                let what = format!(
                    "{} / {} (host added: {changed}): {answers:?}",
                    path.display(),
                    vector.title
                );
                assert!(good <= vector.complete, "more answers than messages: {what}");
                if vector.failed && vector.complete == 0 {
                    assert_eq!(good, 0, "llhttp refuses it: {what}");
                }
                let mut body = Vec::new();
                for _ in 0..good {
                    body.extend(backend.next().await.body);
                }
                // One that was given up when its answer was late may have been forwarded.
                let more = std::iter::from_fn(|| backend.seen.try_recv().ok()).count();
                assert!(more == 0 || !in_time, "forwarded and not answered: {what}");
                if good == vector.complete {
                    assert_eq!(body, vector.body, "another body than llhttp's: {what}");
                    served += usize::from(good > 0);
                }
            }
        }
    }
    assert!(seen > 60 && served > 20, "{seen} vectors, {served} served");
}

#[test]
fn recorded_http2_frames_are_read_as_recorded() {
    let Some(data) = data() else { return };
    let mut count = 0;
    for folder in std::fs::read_dir(data.join("http2-frame-test-case")).unwrap() {
        let folder = folder.unwrap().path();
        if !folder.is_dir() || folder.ends_with("error") {
            continue;
        }
        for path in files(&folder, "json") {
            let case: serde_json::Value =
                serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
            let wire = unhex(case["wire"].as_str().unwrap());
            let (found, rest) = Frame::parse(&wire).unwrap();
            let expected = &case["frame"];
            assert!(rest.is_empty(), "{}", path.display());
            assert_eq!(
                u64::from(found.kind),
                expected["type"].as_u64().unwrap(),
                "{}",
                path.display()
            );
            assert_eq!(
                u64::from(found.flags),
                expected["flags"].as_u64().unwrap(),
                "{}",
                path.display()
            );
            assert_eq!(
                u64::from(found.stream),
                expected["stream_identifier"].as_u64().unwrap(),
                "{}",
                path.display()
            );
            assert_eq!(frame(found.kind, found.flags, found.stream, &found.payload), wire);
            count += 1;
        }
    }
    assert!(count >= 12, "{count}");
}

#[tokio::test]
async fn recorded_bad_http2_frames_end_the_stream_or_the_connection() {
    let Some(data) = data() else { return };
    let harness = Harness::start();
    let backend = Backend::named("b").await;
    harness.cluster("c", &[backend.address]).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    let mut count = 0;
    for path in files(&data.join("http2-frame-test-case/error"), "json") {
        let case: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let wire = unhex(case["wire"].as_str().unwrap());
        let mut client = RawClient::connect(at, &[]).await;
        // Frames of stream 2 and so on are of streams that a client may not open; they fail for that at the latest.
        client
            .send(&frame(HEADERS, END_HEADERS, 1, &request("POST", "/", &[])))
            .await;
        client.send(&wire).await;
        // A connection that is still good answers this.
        client.get(3, &request("GET", "/", &[])).await;
        let fate = client.fate(3).await;
        let reset_only = fate == Fate::Status(200);
        if reset_only {
            // Then it was an error of a stream: RFC 9113 lets a zero increment be one.
            assert!(
                path.ends_with("window_update-frame-increment.json")
                    || path.ends_with("priority-frame-size.json"),
                "{}: the connection goes on",
                path.display()
            );
        }
        count += 1;
    }
    assert!(count >= 20, "{count}");
    let (status, _, _) = get(at, "/").await;
    assert_eq!(status, 200);
}

#[tokio::test]
async fn header_blocks_of_other_encoders_arrive_as_they_were_meant() {
    let Some(data) = data() else { return };
    let harness = Harness::start();
    let mut backend = Backend::named("b").await;
    harness.cluster("c", &[backend.address]).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    let mut blocks = 0;
    let mut encoders = 0;
    for encoder in std::fs::read_dir(data.join("hpack-test-case")).unwrap() {
        let encoder = encoder.unwrap().path();
        if !encoder.is_dir() {
            continue;
        }
        encoders += 1;
        for path in files(&encoder, "json").into_iter().take(8) {
            let story: serde_json::Value =
                serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
            let cases = story["cases"].as_array().unwrap();
            // The listener's table is 4,096 and stays so; larger ones are negotiated otherwise. Stories of responses
            // cannot be sent to a server.
            let fits = cases.iter().all(|case| {
                case["header_table_size"].as_u64().is_none_or(|size| size <= 4096)
                    && case["headers"]
                        .as_array()
                        .unwrap()
                        .iter()
                        .any(|field| field.get(":method").is_some())
            });
            if !fits {
                continue;
            }
            let mut client = RawClient::connect(at, &[]).await;
            for (index, case) in cases.iter().take(12).enumerate() {
                let stream = index as u32 * 2 + 1;
                client.get(stream, &unhex(case["wire"].as_str().unwrap())).await;
                let what = format!("{} {index}", path.display());
                let fate = client.fate(stream).await;
                // Recorded with fields of HTTP/1 connections, which HTTP/2 forbids.
                let forbidden = case["headers"].as_array().unwrap().iter().any(|field| {
                    [
                        "connection",
                        "keep-alive",
                        "transfer-encoding",
                        "proxy-connection",
                    ]
                    .iter()
                    .any(|name| field.get(name).is_some())
                });
                if forbidden {
                    assert!(fate.refused(), "{what}: {fate:?}");
                    continue;
                }
                assert_eq!(fate, Fate::Status(200), "{what}");
                let seen = backend.next().await;
                for field in case["headers"].as_array().unwrap() {
                    for (name, value) in field.as_object().unwrap() {
                        let value = value.as_str().unwrap();
                        match name.as_str() {
                            ":method" => assert_eq!(seen.method, value, "{what}"),
                            ":path" => assert_eq!(seen.path, value, "{what}"),
                            ":authority" => assert_eq!(seen.headers["host"], value, "{what}"),
                            ":scheme" | "connection" | "keep-alive" | "proxy-connection" | "te"
                            | "x-forwarded-for" => {}
                            // Cookies may be split into several fields.
                            "cookie" => assert!(
                                seen.headers.get_all("cookie").iter().any(|have| {
                                    have.as_bytes()
                                        .windows(value.len())
                                        .any(|part| part == value.as_bytes())
                                }),
                                "{what}: {value}"
                            ),
                            _ => assert!(
                                seen.headers
                                    .get_all(name)
                                    .iter()
                                    .any(|have| have.as_bytes() == value.as_bytes()),
                                "{what}: {name}: {value}"
                            ),
                        }
                    }
                }
                blocks += 1;
            }
        }
    }
    assert!(
        encoders >= 10 && blocks > 40,
        "{encoders} encoders, {blocks} blocks"
    );
}

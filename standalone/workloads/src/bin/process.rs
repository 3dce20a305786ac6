//! The hidden subcommands `node` and `shim` without the rest of `serin`, and `serve`, a program for containers: what
//! this crate's tests start. The binary `serin` is built from the same functions.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::FromRawFd;
use std::process::ExitCode;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .with_env_filter(tracing_subscriber::EnvFilter::new("info,serin_workloads=debug"))
        .init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.split_first() {
        Some((command, rest)) if command == "shim" => serin_workloads::shim::main(rest),
        Some((command, rest)) if command == "node" && !rest.is_empty() => {
            serin_workloads::node::main(std::path::Path::new(&rest[0]))
        }
        Some((command, rest)) if command == "serve" && !rest.is_empty() => serve(&rest[0]),
        _ => {
            eprintln!("usage: serin-workloads-process shim CONFIG | node FILE | serve PORT");
            ExitCode::from(2)
        }
    }
}

/// Answers every HTTP request on a port (its own, or an inherited listener) with facts about the process.
fn serve(port: &str) -> ExitCode {
    let inherited = std::env::var("SERIN_LISTENERS").unwrap_or_default();
    let number = inherited
        .split(',')
        .filter_map(|pair| pair.split_once('='))
        .find(|(of, _)| *of == port)
        .and_then(|(_, number)| number.parse::<i32>().ok());
    let listener = match number {
        Some(number) => inherited_listener(number),
        None => match TcpListener::bind(format!("0.0.0.0:{port}")) {
            Ok(listener) => listener,
            Err(error) => {
                eprintln!("bind {port}: {error}");
                return ExitCode::FAILURE;
            }
        },
    };
    println!("serving {port}");
    for stream in listener.incoming().flatten() {
        std::thread::spawn(move || answer(stream));
    }
    ExitCode::SUCCESS
}

#[allow(unsafe_code)]
fn inherited_listener(number: i32) -> TcpListener {
    // SAFETY: whoever started this process put a listening socket there and said so in SERIN_LISTENERS.
    let listener = unsafe { TcpListener::from_raw_fd(number) };
    let _ = listener.set_nonblocking(false);
    listener
}

fn answer(mut stream: TcpStream) {
    let mut request = [0_u8; 4096];
    let length = stream.read(&mut request).unwrap_or(0);
    let path = String::from_utf8_lossy(&request[..length])
        .split(' ')
        .nth(1)
        .unwrap_or("/")
        .to_owned();
    let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let status = if path == "/fail" {
        "500 Internal Server Error"
    } else {
        "200 OK"
    };
    let body = match path.strip_prefix("/file") {
        Some(file) => std::fs::read_to_string(file).unwrap_or_else(|error| error.to_string()),
        None => format!(
            "pod={} pid={} image={}\n",
            hostname.trim(),
            std::process::id(),
            std::env::var("SERIN_IMAGE").unwrap_or_default()
        ),
    };
    let _ = write!(
        stream,
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
}

//! tokio's runtime of several threads at both ends: server|client ADDRESS PORT. Each client sends
//! a stream and compares the echo.

use std::env;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Builder;

const CONNECTIONS: u64 = 16;
const TOTAL: usize = 3_000_000;

fn byte(number: u64, place: usize) -> u8 {
    ((place as u64 + number * 77).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

async fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    let (mut read, mut write) = stream.split();
    let mut buffer = vec![0; 20_000];
    loop {
        let got = read.read(&mut buffer).await?;
        if got == 0 {
            return write.shutdown().await;
        }
        write.write_all(&buffer[..got]).await?;
    }
}

async fn serve(address: String) {
    let listener = TcpListener::bind(address).await.unwrap();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        tokio::spawn(echo(stream));
    }
}

async fn call(address: String, number: u64) {
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut read, mut write) = stream.into_split();
    // First ping-pong, while the connection moves; then both directions at once.
    for turn in 0..200 {
        write.write_all(&[turn as u8; 100]).await.unwrap();
        let mut got = [0; 100];
        read.read_exact(&mut got).await.unwrap();
        assert!(got.iter().all(|&each| each == turn as u8));
    }
    let sender = tokio::spawn(async move {
        let (mut place, mut size) = (0, 1);
        while place < TOTAL {
            size = (size * 7 + 13) % 90_000 + 1;
            let end = TOTAL.min(place + size);
            let bytes: Vec<u8> = (place..end).map(|at| byte(number, at)).collect();
            write.write_all(&bytes).await.unwrap();
            place = end;
        }
        write.shutdown().await.unwrap();
    });
    let mut buffer = vec![0; 50_000];
    let mut place = 0;
    loop {
        let got = read.read(&mut buffer).await.unwrap();
        if got == 0 {
            break;
        }
        for at in 0..got {
            assert_eq!(buffer[at], byte(number, place + at));
        }
        place += got;
    }
    assert_eq!(place, TOTAL);
    sender.await.unwrap();
}

fn main() {
    let arguments: Vec<String> = env::args().collect();
    let address = format!("{}:{}", arguments[2], arguments[3]);
    let runtime = Builder::new_multi_thread().worker_threads(4).enable_io().build().unwrap();
    if arguments[1] == "server" {
        return runtime.block_on(serve(address));
    }
    let calls: Vec<_> = (0..CONNECTIONS).map(|number| runtime.spawn(call(address.clone(), number))).collect();
    for each in calls {
        runtime.block_on(each).unwrap();
    }
}

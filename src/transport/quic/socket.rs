//! The UDP socket under quinn: large kernel buffers, and no send that the kernel must refuse.
//!
//! quinn hands the kernel up to ten packets in one call (GSO). Ten of 8,952 bytes exceed what one UDP send may
//! hold; the kernel answers EMSGSIZE, quinn takes that for a lost MTU probe, and the path falls back to 1,200 bytes
//! for a minute. [`CappedSocket`] offers as many segments as fit of the largest packets it has seen.

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};
use rustix::net::sockopt;
use socket2::{Domain, Protocol, Socket, Type};

/// Payload of the largest UDP send: 65,535 less IPv4 and UDP headers.
const MAX_SEND_BYTES: usize = 65_507;

/// Segments that Linux takes in one send (UDP_MAX_SEGMENTS before 6.9).
const MAX_SEGMENTS: usize = 64;

/// The packet size until a larger one was seen: what fits Ethernet.
const FIRST_SEGMENT_BYTES: usize = 1_452;

/// Binds and wraps a socket. Must run inside a tokio runtime.
pub(super) fn bind(addr: SocketAddr, buffer_bytes: u32) -> io::Result<Arc<dyn AsyncUdpSocket>> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    if addr.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.bind(&addr.into())?;
    socket.set_nonblocking(true)?;
    enlarge(&socket, buffer_bytes as usize)?;
    let inner = TokioRuntime.wrap_udp_socket(UdpSocket::from(socket))?;
    Ok(Arc::new(CappedSocket { inner, largest_segment: AtomicUsize::new(FIRST_SEGMENT_BYTES) }))
}

/// Buffers for bursts that outrun the scheduler. The forced variants pass the system's limit but need
/// CAP_NET_ADMIN; without it the limit holds, and the kernel clips silently.
fn enlarge(socket: &Socket, bytes: usize) -> io::Result<()> {
    if sockopt::set_socket_recv_buffer_size_force(socket, bytes).is_err() {
        socket.set_recv_buffer_size(bytes)?;
    }
    if sockopt::set_socket_send_buffer_size_force(socket, bytes).is_err() {
        socket.set_send_buffer_size(bytes)?;
    }
    Ok(())
}

#[derive(Debug)]
struct CappedSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    largest_segment: AtomicUsize,
}

impl CappedSocket {
    /// Sends a batch that was cut before its packets had grown, in two halves. Should the second have to wait,
    /// quinn repeats both, and the peer ignores the packets it knows.
    fn send_split(&self, transmit: &Transmit<'_>, segment: usize) -> io::Result<()> {
        let fits = MAX_SEND_BYTES / segment * segment;
        let (first, rest) = transmit.contents.split_at(fits);
        for contents in [first, rest] {
            self.inner.try_send(&Transmit { contents, segment_size: Some(segment), ..*transmit })?;
        }
        Ok(())
    }
}

impl AsyncUdpSocket for CappedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.inner).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        if let Some(segment) = transmit.segment_size {
            if segment > self.largest_segment.load(Ordering::Relaxed) {
                self.largest_segment.store(segment, Ordering::Relaxed);
            }
            if transmit.contents.len() > MAX_SEND_BYTES {
                return self.send_split(transmit, segment);
            }
        }
        self.inner.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        let fit = MAX_SEND_BYTES / self.largest_segment.load(Ordering::Relaxed);
        self.inner.max_transmit_segments().min(MAX_SEGMENTS).min(fit)
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;

    /// Remembers what reaches the kernel.
    #[derive(Debug, Default)]
    struct Kernel(Mutex<Vec<usize>>);

    impl AsyncUdpSocket for Kernel {
        fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
            unreachable!("nothing waits in this test")
        }
        fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
            self.0.lock().push(transmit.contents.len());
            Ok(())
        }
        fn poll_recv(
            &self,
            _: &mut Context<'_>,
            _: &mut [IoSliceMut<'_>],
            _: &mut [RecvMeta],
        ) -> Poll<io::Result<usize>> {
            Poll::Pending
        }
        fn local_addr(&self) -> io::Result<SocketAddr> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn max_transmit_segments(&self) -> usize {
            64
        }
    }

    #[test]
    fn no_send_exceeds_what_the_kernel_takes() {
        let kernel = Arc::new(Kernel::default());
        let socket =
            CappedSocket { inner: kernel.clone(), largest_segment: AtomicUsize::new(FIRST_SEGMENT_BYTES) };
        let batch = vec![0; 10 * 8_952 - 100];
        let transmit = Transmit {
            destination: "127.0.0.1:1".parse().unwrap(),
            ecn: None,
            contents: &batch,
            segment_size: Some(8_952),
            src_ip: None,
        };
        assert!(socket.max_transmit_segments() >= 10, "Ethernet-sized packets go out as quinn likes");
        socket.try_send(&transmit).unwrap();
        assert_eq!(*kernel.0.lock(), [7 * 8_952, 3 * 8_952 - 100]);
        assert_eq!(socket.max_transmit_segments(), 7, "and no such batch comes again");
    }
}

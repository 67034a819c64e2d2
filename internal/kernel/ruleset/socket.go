package ruleset

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// nfgenmsg is the size of the header that follows netlink's own.
const nfgenmsg = 4

// socket is for what the nftables library cannot do.
type socket struct{ fd int }

func openSocket(ns int) (*socket, error) {
	fd := -1
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: a thread that changed its namespace is not used again
		err := unix.Setns(ns, unix.CLONE_NEWNET)
		if err == nil {
			fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
		}
		done <- err
	}()
	if err := <-done; err != nil {
		return nil, err
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		unix.Close(fd)
		return nil, err
	}
	// Whom the limit of all sockets binds may have room enough all the same.
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBytes) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, sendBytes)
	}
	return &socket{fd}, nil
}

func (s *socket) close() { unix.Close(s.fd) }

// generation asks the kernel for the number of its rule set, which each transaction raises by one. The library does not
// tell of dumps that a transaction interrupted: a dump is taken as true only if the number is the same before and after.
func (s *socket) generation() (uint32, error) {
	request := make([]byte, unix.NLMSG_HDRLEN+nfgenmsg)
	binary.NativeEndian.PutUint32(request[0:], uint32(len(request)))
	binary.NativeEndian.PutUint16(request[4:], unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETGEN)
	binary.NativeEndian.PutUint16(request[6:], unix.NLM_F_REQUEST)
	if err := unix.Sendto(s.fd, request, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return 0, fmt.Errorf("ask for the generation of the rule set: %w", err)
	}
	answer := make([]byte, 4096)
	size, _, err := unix.Recvfrom(s.fd, answer, 0)
	for errors.Is(err, unix.EINTR) {
		size, _, err = unix.Recvfrom(s.fd, answer, 0)
	}
	if err != nil {
		return 0, fmt.Errorf("ask for the generation of the rule set: %w", err)
	}
	if size >= unix.NLMSG_HDRLEN && binary.NativeEndian.Uint16(answer[4:]) == unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWGEN {
		for b := answer[min(size, unix.NLMSG_HDRLEN+nfgenmsg):size]; len(b) >= unix.SizeofNlAttr; {
			length := int(binary.NativeEndian.Uint16(b))
			if length < unix.SizeofNlAttr || length > len(b) {
				break
			}
			if binary.NativeEndian.Uint16(b[2:]) == unix.NFTA_GEN_ID && length >= unix.SizeofNlAttr+4 {
				return binary.BigEndian.Uint32(b[unix.SizeofNlAttr:]), nil
			}
			b = b[min(len(b), (length+3)&^3):]
		}
	}
	return 0, errors.New("ask for the generation of the rule set: the kernel's answer has none")
}

package cri

import (
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// failed says what was attempted on which runtime.
func (c *Client) failed(what string, err error) error {
	s, ok := status.FromError(err)
	if !ok {
		return fmt.Errorf("container runtime at %s: %s: %w", c.socket, what, err)
	}
	switch s.Code() {
	case codes.Unavailable:
		return fmt.Errorf("container runtime at %s: %s: no answer (%w); is the node running, and containerd on it?", c.socket, what, err)
	case codes.Unimplemented:
		return fmt.Errorf("container runtime at %s: %s: it does not offer CRI v1 (%w); containerd's cri plugin is disabled or did not load: see its log", c.socket, what, err)
	}
	return fmt.Errorf("container runtime at %s: %s: %w", c.socket, what, err)
}

// isGone reports whether the thing asked about does not exist any more.
func isGone(err error) bool { return status.Code(err) == codes.NotFound }

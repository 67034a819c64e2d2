package ipam

import (
	"errors"
	"fmt"
	"net/netip"
)

// ExhaustedError says that a pool has no address left.
type ExhaustedError struct{ Usage }

func (e *ExhaustedError) Error() string {
	return fmt.Sprintf("pool %q has no free %s address on this node: %d of %d in use, %d cooling down; "+
		"wait for pods to go, give the pool another range, or move pods to other nodes",
		e.Pool, e.Family, e.InUse, e.Size, e.Cooling)
}

// NoRangesError says that the node has no range to give addresses from.
type NoRangesError struct{ Pool string }

func (e *NoRangesError) Error() string {
	if e.Pool == "" {
		return "this node has no pool for pods that ask for none; see whether the Node has podCIDRs and fathom-agent runs on it"
	}
	return fmt.Sprintf("pool %q has no ranges on this node; see whether the Node has podCIDRs and fathom-agent runs on it", e.Pool)
}

// TakenError says that an address that was asked for is another's, or was until a moment ago.
type TakenError struct {
	Address netip.Addr
	Cooling bool
}

func (e *TakenError) Error() string {
	if e.Cooling {
		return fmt.Sprintf("%s was another pod's and is cooling down", e.Address)
	}
	return fmt.Sprintf("%s is in use by another pod", e.Address)
}

// RequestError says what is wrong with what a pod asks for.
type RequestError struct{ Problem string }

func (e *RequestError) Error() string { return e.Problem }

// IsTemporary says whether the same request may be granted later, when pods have gone or ranges have come.
func IsTemporary(err error) bool {
	var (
		exhausted *ExhaustedError
		none      *NoRangesError
		taken     *TakenError
	)
	return errors.As(err, &exhausted) || errors.As(err, &none) || errors.As(err, &taken)
}

// IsRequest says whether err is about what a pod asks for, and repeating it is of no use.
func IsRequest(err error) bool {
	var r *RequestError
	return errors.As(err, &r)
}

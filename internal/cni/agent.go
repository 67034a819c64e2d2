package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/fathom-network/fathom/internal/facts/conflist"
	"github.com/fathom-network/fathom/internal/facts/ipam"
)

// patience is how long the agent may take. It is on this machine: one that takes longer is not well, and pods are
// attached without it.
const patience = 2 * time.Second

// agent is asked over its socket. Where there are no address pools it is never needed: a node carries pods while it
// restarts.
type agent struct {
	socket   string
	required bool
}

func (c *call) agent() agent { return agent{c.AgentSocket, c.AgentRequired} }

// agentError says that the agent is there and gives no sensible answer. Guessing might give a pod another address
// than its owner was told, so the runtime tries again.
type agentError struct{ problem string }

func (e *agentError) Error() string { return e.problem }

// errAway says that there is no agent to ask.
var errAway = errors.New("the agent is away")

// request asks which pool or address a pod is to have. If the agent is away, or does not know the pod, which is so
// for one that kubelet runs from a file, it is nothing in particular.
func (a agent) request(p podName) (ipam.Request, error) {
	// The UID tells the pod from an earlier one of its name, which may have asked for something else.
	status, body, err := a.get("/v1/pods/" + url.PathEscape(p.namespace) + "/" + url.PathEscape(p.name) + "?uid=" + url.QueryEscape(p.uid))
	switch {
	case errors.Is(err, errAway) && a.required:
		return ipam.Request{}, &agentError{"fathom-agent does not answer on this node, and pods may ask for address pools that it knows; see its pod and log"}
	case errors.Is(err, errAway), err == nil && status == 404:
		return ipam.Request{}, nil
	case err != nil:
		return ipam.Request{}, err
	case status == 422:
		return ipam.Request{}, &ipam.RequestError{Problem: string(bytes.TrimSpace(body))}
	case status != 200:
		return ipam.Request{}, &agentError{fmt.Sprintf("the agent answers %d: %s", status, bytes.TrimSpace(body))}
	}
	var answer struct {
		Pool      string       `json:"pool"`
		Addresses []netip.Addr `json:"addresses"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return ipam.Request{}, &agentError{fmt.Sprintf("the agent's answer is not what it should be: %v", err)}
	}
	for i, address := range answer.Addresses {
		if !address.IsValid() || address.Zone() != "" {
			return ipam.Request{}, &agentError{fmt.Sprintf("the agent's answer is not what it should be: address %q", address)}
		}
		answer.Addresses[i] = address.Unmap()
	}
	return ipam.Request{Pool: answer.Pool, Addresses: answer.Addresses}, nil
}

// awaitPolicies returns when the policies of a pod that is attached are in the kernel. Where the agent is away or does not know the pod,
// the pod may start if it is closed: if the kernel holds policies, which drop what they do not know. isolates says that there were
// policies when the agent was last seen.
func (a agent) awaitPolicies(p podName, addrs []netip.Addr, isolates bool) error {
	q := url.Values{"uid": {p.uid}}
	for _, address := range addrs {
		q.Add("address", address.String())
	}
	status, body, err := 404, []byte(nil), error(nil)
	if p.name != "" { // else it is no pod of Kubernetes
		status, body, err = a.get("/v1/pods/" + url.PathEscape(p.namespace) + "/" + url.PathEscape(p.name) + "/policies?" + q.Encode())
	}
	switch {
	case errors.Is(err, errAway), err == nil && status == 404:
		mark := filepath.Join(filepath.Dir(a.socket), conflist.ClosedMark)
		if _, err := os.Stat(mark); isolates && err != nil {
			return &agentError{"fathom-agent does not answer on this node, and the kernel holds no NetworkPolicies that would keep the pod closed until it does; see its pod and log"}
		}
		return nil
	case err != nil:
		return err
	case status != 200:
		return &agentError{fmt.Sprintf("the agent answers %d: %s", status, bytes.TrimSpace(body))}
	}
	return nil
}

// notReady returns why the agent holds that the node cannot carry pods, or nothing. An agent that is away, or that
// has no opinion, is no reason.
func (a agent) notReady() string {
	status, body, err := a.get("/v1/status")
	if err == nil && status == 503 {
		return string(bytes.TrimSpace(body)) + " (503)"
	}
	return ""
}

// get is an HTTP request by hand: package net/http would make the plugin three times as large, and it starts anew
// for each pod. HTTP/1.0 has neither chunks nor a connection that stays.
func (a agent) get(path string) (status int, body []byte, err error) {
	if a.socket == "" {
		return 0, nil, errAway
	}
	conn, err := net.DialTimeout("unix", a.socket, patience)
	if err != nil {
		return 0, nil, errAway
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return 0, nil, errAway
	}
	if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.0\r\nHost: agent\r\n\r\n", path); err != nil {
		return 0, nil, errAway
	}
	const most = 1 << 20
	data, err := io.ReadAll(io.LimitReader(conn, most))
	if err != nil || len(data) == 0 { // it hangs, or it went while it was asked
		return 0, nil, errAway
	}
	status, body, ok := parseResponse(data)
	if !ok {
		return 0, nil, &agentError{fmt.Sprintf("the agent does not speak HTTP: %.40q", data)}
	}
	return status, body, nil
}

func parseResponse(data []byte) (status int, body []byte, ok bool) {
	head, body, found := bytes.Cut(data, []byte("\r\n\r\n"))
	line, _, _ := bytes.Cut(head, []byte("\r\n"))
	fields := strings.Fields(string(line))
	if !found || len(fields) < 2 || !strings.HasPrefix(fields[0], "HTTP/1.") {
		return 0, nil, false
	}
	if status, err := strconv.Atoi(fields[1]); err == nil {
		return status, body, true
	}
	return 0, nil, false
}

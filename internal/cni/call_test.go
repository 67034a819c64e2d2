package cni

import (
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/fathom-network/fathom/internal/facts/conflist"
	"github.com/fathom-network/fathom/internal/facts/ipam"
	"github.com/fathom-network/fathom/internal/kernel/lease"
	"github.com/fathom-network/fathom/internal/kernel/podlink"
	"github.com/fathom-network/fathom/internal/testenv"
)

const config = `{"cniVersion":"1.1.0","name":"fathom","type":"fathom-cni","mtu":1450,"nodeAddresses":["10.201.1.3","fd00::3"],` +
	`"pools":[{"name":"default","ranges":["10.244.1.0/24","fd00:10:244:1::/64"]}],"dataDir":"/var/lib/cni/fathom","coolDown":"30s"`

func TestNames(t *testing.T) {
	a := lease.Attachment{ContainerID: strings.Repeat("a1", 32), IfName: "eth0"}
	seen := map[string]string{}
	for _, test := range []struct{ pod, start string }{
		{"coredns-7db6d8ff4d-abcde", "coredns-"}, {"web-0", "web-0-"}, {"a.b.c.d.e.f.g.h.i", "abcdefgh-"},
		{"", "pod-"}, {"--/../..", "pod-"}, {"日本", "pod-"}, {"x", "x-"},
	} {
		name := hostDevice(test.pod, a, 0)
		if !strings.HasPrefix(name, test.start) || len(name) != len(test.start)+5 || len(name) > 15 {
			t.Errorf("the device of pod %q is %q, want %q and five more", test.pod, name, test.start)
		}
		seen[name[len(name)-5:]] = name
	}
	if len(seen) != 1 {
		t.Errorf("one attachment gives several: %v", seen)
	}
	b := lease.Attachment{ContainerID: a.ContainerID, IfName: "eth1"}
	if hostDevice("web", a, 0) == hostDevice("web", b, 0) || hostDevice("web", a, 0) == hostDevice("web", a, 1) || slices.Equal(mac(a, "pod"), mac(a, "node")) {
		t.Error("what is different has one name")
	}
	if m := mac(a, "pod"); m[0]&3 != 2 {
		t.Errorf("%s is not a unicast address of our own making", m)
	}
	l := lease.Lease{Attachment: a, Network: "fathom", PodNamespace: strings.Repeat("n", 63), PodName: strings.Repeat("p", 253)}
	if s := alias(l); len(s) != 255 || !isOf("fathom", podlink.Device{Alias: s}) || isOf("fath", podlink.Device{Alias: s}) {
		t.Errorf("alias %q", s)
	}
}

func TestParse(t *testing.T) {
	for _, test := range []struct {
		name, stdin, args string
		code              uint // 0: none
		check             func(c *call) bool
	}{
		{name: "plain", stdin: config + `}`, args: "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_UID=u;X=a=b",
			check: func(c *call) bool { return c.pod == podName{"default", "web", "u"} && c.Name == "fathom" }},
		{name: "addresses", stdin: config + `,"runtimeConfig":{"ips":["10.244.1.5/24","fd00:10:244:1::5"]},"args":{"cni":{"ips":["10.9.9.9"]}}}`, args: "IP=10.8.8.8",
			check: func(c *call) bool {
				return slices.Equal(c.addresses, []netip.Addr{netip.MustParseAddr("10.244.1.5"), netip.MustParseAddr("fd00:10:244:1::5")})
			}},
		{name: "addresses of args", stdin: config + `,"args":{"cni":{"ips":["10.9.9.9"]}}}`, args: "IP=10.8.8.8",
			check: func(c *call) bool { return c.addresses[0].String() == "10.9.9.9" }},
		{name: "address of CNI_ARGS", stdin: config + `}`, args: "IP=10.8.8.8",
			check: func(c *call) bool { return c.addresses[0].String() == "10.8.8.8" }},
		{name: "an earlier result", stdin: config + `,"prevResult":{"cniVersion":"1.1.0","interfaces":[{"name":"x0"}],"ips":[{"address":"10.1.1.1/24","interface":0}]}}`,
			check: func(c *call) bool {
				r := c.result(lease.Lease{Addresses: []netip.Addr{netip.MustParseAddr("10.244.1.5")}}, podlink.Pod{Device: "eth0"})
				return len(r.Interfaces) == 3 && len(r.IPs) == 2 && *r.IPs[1].Interface == 2 && r.Interfaces[0].Name == "x0"
			}},
		{name: "host ports", stdin: config + `,"capabilities":{"portMappings":true},"runtimeConfig":{"portMappings":[{"hostPort":8080,"containerPort":80,"protocol":"UDP","hostIP":"192.0.2.1"},{"hostPort":0,"containerPort":1},{"hostPort":1,"containerPort":2}]}}`,
			check: func(c *call) bool {
				return slices.Equal(c.hostPorts, []lease.HostPort{{Protocol: "udp", Addr: netip.MustParseAddr("192.0.2.1"), Port: 8080, Container: 80}, {Protocol: "tcp", Port: 1, Container: 2}})
			}},
		{name: "no host ports", stdin: config + `,"capabilities":{"portMappings":true}}`, check: func(c *call) bool { return c.hostPorts != nil && len(c.hostPorts) == 0 }},
		{name: "host ports unasked", stdin: config + `}`, check: func(c *call) bool { return c.hostPorts == nil }},
		{name: "bad host port", stdin: config + `,"capabilities":{"portMappings":true},"runtimeConfig":{"portMappings":[{"hostPort":65536,"containerPort":80}]}}`, code: types.ErrInvalidNetworkConfig},
		{name: "bad host IP", stdin: config + `,"capabilities":{"portMappings":true},"runtimeConfig":{"portMappings":[{"hostPort":80,"containerPort":80,"hostIP":"x"}]}}`, code: types.ErrInvalidNetworkConfig},
		{name: "no JSON", stdin: `{`, code: types.ErrDecodingFailure},
		{name: "a number", stdin: `1`, code: types.ErrDecodingFailure},
		{name: "bad ips", stdin: config + `,"runtimeConfig":{"ips":["x"]}}`, code: types.ErrInvalidNetworkConfig},
		{name: "bad ips", stdin: config + `,"runtimeConfig":{"ips":"x"}}`, code: types.ErrDecodingFailure},
		{name: "bad mac", stdin: config + `,"runtimeConfig":{"mac":"01:00:00:00:00:00"}}`, code: types.ErrInvalidNetworkConfig},
		{name: "bad args", stdin: config + `}`, args: "K8S", code: types.ErrInvalidEnvironmentVariables},
		{name: "bad prevResult", stdin: config + `,"prevResult":{"cniVersion":"1.1.0","ips":1}}`, code: types.ErrDecodingFailure},
		{name: "bad attachments", stdin: config + `,"cni.dev/valid-attachments":1}`, code: types.ErrDecodingFailure},
		{name: "bad pool", stdin: strings.Replace(config, "10.244.1.0", "10.244.1.1", 1) + `}`, code: types.ErrInvalidNetworkConfig},
	} {
		c, err := parse(&skel.CmdArgs{ContainerID: "c", IfName: "eth0", Args: test.args, StdinData: []byte(test.stdin)}, false)
		if test.code != 0 {
			var e *types.Error
			if !errors.As(asError("x", err), &e) || e.Code != test.code {
				t.Errorf("%s: %v, want code %d", test.name, err, test.code)
			}
		} else if err != nil || !test.check(c) {
			t.Errorf("%s: %+v, %v", test.name, c, err)
		}
	}
}

// TestAgent asks a real HTTP server what a pod is to have.
func TestAgent(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "agent.sock")
	a := agent{socket: socket}
	p := podName{namespace: "default", name: "web/0", uid: "u&1"}
	var e *types.Error
	if _, err := (agent{socket, true}).request(p); !errors.As(asError("x", err), &e) || e.Code != types.ErrTryAgainLater {
		t.Errorf("without an agent that is required: %v", err)
	}
	if r, err := a.request(p); err != nil || r.Pool != "" || r.Addresses != nil || a.notReady() != "" {
		t.Errorf("without an agent: %+v, %v", r, err)
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var answer func(w http.ResponseWriter)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v1/pods/default/web/0" && r.URL.Path != "/v1/status" {
			t.Errorf("asked for %s", r.URL)
		}
		if strings.HasPrefix(r.URL.Path, "/v1/pods") && r.URL.Query().Get("uid") != p.uid {
			t.Errorf("asked for %s", r.URL)
		}
		answer(w)
	})}
	go func() { _ = server.Serve(listener) }()
	defer server.Close()
	for _, test := range []struct {
		status    int
		body      string
		want      ipam.Request
		fails     bool
		permanent bool
	}{
		{status: 200, body: `{}`},
		{status: 200, body: `{"pool":"public","addresses":["10.244.1.77","::ffff:10.0.0.1"]}`,
			want: ipam.Request{Pool: "public", Addresses: []netip.Addr{netip.MustParseAddr("10.244.1.77"), netip.MustParseAddr("10.0.0.1")}}},
		{status: 200, body: strings.Repeat(" ", 5000) + `{"pool":"long"}`, want: ipam.Request{Pool: "long"}},
		{status: 404, body: "unknown"},
		{status: 500, body: "not well", fails: true},
		{status: 422, body: "there is no IPPool \"x\"\n", fails: true, permanent: true},
		{status: 200, body: "not JSON", fails: true},
		{status: 200, body: `{"addresses":[""]}`, fails: true},
	} {
		answer = func(w http.ResponseWriter) {
			w.WriteHeader(test.status)
			_, _ = w.Write([]byte(test.body))
		}
		r, err := a.request(p)
		if (err != nil) != test.fails || r.Pool != test.want.Pool || !slices.Equal(r.Addresses, test.want.Addresses) {
			t.Errorf("%d %s: %+v, %v", test.status, test.body, r, err)
		}
		code := types.ErrTryAgainLater
		if test.permanent {
			code = types.ErrInvalidNetworkConfig
		}
		if test.fails && (!errors.As(asError("x", err), &e) || e.Code != code) {
			t.Errorf("%d %s: %v", test.status, test.body, e)
		}
	}
	answer = func(w http.ResponseWriter) { http.Error(w, "no ranges yet", http.StatusServiceUnavailable) }
	if got := a.notReady(); !strings.Contains(got, "no ranges yet") {
		t.Errorf("not ready: %q", got)
	}
	answer = func(http.ResponseWriter) { panic(http.ErrAbortHandler) } // it goes while it is asked
	if r, err := a.request(p); err != nil || r.Pool != "" {
		t.Errorf("an agent that goes: %+v, %v", r, err)
	}
}

// TestAwaitPolicies: a pod may start if its policies are in the kernel, if there are none, or if it is closed.
func TestAwaitPolicies(t *testing.T) {
	addrs := []netip.Addr{netip.MustParseAddr("10.244.1.7"), netip.MustParseAddr("fd00::7")}
	p := podName{namespace: "default", name: "web", uid: "u&1"}
	for _, tc := range []struct {
		what             string
		status           int // of the agent's answer; 0 is away
		isolates, closed bool
		nobody           bool // it is no pod of Kubernetes
		fails            bool
	}{
		{what: "the policies are in the kernel", status: 200, isolates: true},
		{what: "they are not in time", status: 503, isolates: true, closed: true, fails: true},
		{what: "no policies, no agent"},
		{what: "no agent, closed", isolates: true, closed: true},
		{what: "no agent after a boot", isolates: true, fails: true},
		{what: "unknown to the agent, closed", status: 404, isolates: true, closed: true},
		{what: "unknown to the agent, and the kernel holds nothing", status: 404, isolates: true, fails: true},
		{what: "unknown to the agent, and no policies", status: 404},
		{what: "no pod of Kubernetes, and the kernel holds nothing", status: 200, isolates: true, nobody: true, fails: true},
		{what: "no pod of Kubernetes, closed", status: 503, isolates: true, closed: true, nobody: true},
	} {
		t.Run(tc.what, func(t *testing.T) {
			dir := t.TempDir()
			socket := filepath.Join(dir, "agent.sock")
			if tc.closed {
				testenv.Must(t, os.WriteFile(filepath.Join(dir, conflist.ClosedMark), nil, 0o600))
			}
			if tc.status != 0 {
				listener, err := net.Listen("unix", socket)
				testenv.Must(t, err)
				server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if q := r.URL.Query(); r.URL.Path != "/v1/pods/default/web/policies" || q.Get("uid") != p.uid || !slices.Equal(q["address"], []string{"10.244.1.7", "fd00::7"}) {
						t.Errorf("asked for %s", r.URL)
					}
					w.WriteHeader(tc.status)
				})}
				go func() { _ = server.Serve(listener) }()
				defer server.Close()
			}
			who := p
			if tc.nobody {
				who = podName{}
			}
			err := (agent{socket: socket}).awaitPolicies(who, addrs, tc.isolates)
			if (err != nil) != tc.fails {
				t.Errorf("%v", err)
			}
			var e *types.Error
			if tc.fails && (!errors.As(asError("x", err), &e) || e.Code != types.ErrTryAgainLater) {
				t.Errorf("%v: want the runtime to try again", err)
			}
		})
	}
}

// TestHungAgent is an agent that accepts and says nothing: the pod waits no longer than for patience.
func TestHungAgent(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "agent.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	start := time.Now()
	if _, err := (agent{socket: socket}).request(podName{name: "web"}); err != nil || time.Since(start) > patience+time.Second {
		t.Errorf("%v after %s", err, time.Since(start))
	}
}

// TestAttachUndone needs no kernel: with an address that is somebody else's nothing is made, and nothing is held.
func TestAttachUndone(t *testing.T) {
	store, err := lease.Open(t.TempDir(), 0)
	if err != nil {
		t.Fatal(err)
	}
	c, err := parse(&skel.CmdArgs{ContainerID: "c", IfName: "eth0", StdinData: []byte(config + `}`)}, false)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []ipam.Request{{Pool: "x"}, {Addresses: []netip.Addr{netip.MustParseAddr("10.244.1.1")}}} {
		if _, _, err := c.attach(nil, nil, store, r); err == nil {
			t.Errorf("%+v is granted", r)
		}
	}
	if all, _ := store.List(); len(all) > 0 {
		t.Errorf("%v is held", all)
	}
}

// FuzzParse: whatever comes, there is a call or an error with a code of the specification, and what CHECK makes of it
// does not panic.
func FuzzParse(f *testing.F) {
	for _, args := range []string{"", "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web", "IP=10.244.1.3", "=;;a"} {
		f.Add([]byte(config+`}`), args)
	}
	f.Add([]byte(config+`,"runtimeConfig":{"ips":["10.244.1.5/24"],"mac":"02:11:22:33:44:55"},"dns":{"nameservers":["10.96.0.10"]},"cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}]}`), "")
	f.Add([]byte(config+`,"capabilities":{"portMappings":true},"runtimeConfig":{"portMappings":[{"hostPort":8080,"containerPort":80,"protocol":"udp","hostIP":"::1%x"},{"hostPort":-1}]}}`), "")
	f.Add([]byte(strings.Replace(config, "1.1.0", "0.4.0", 1)+`,"prevResult":{"interfaces":[{"name":"web-abcde"},{"name":"eth0","mac":"02:11:22:33:44:55","sandbox":"/n"}],`+
		`"ips":[{"version":"4","interface":1,"address":"10.244.1.5/32","gateway":"169.254.1.1"}],"routes":[{"dst":"169.254.1.1/32"},{"dst":"0.0.0.0/0","gw":"169.254.1.1"}]}}`), "")
	f.Add([]byte(config+`,"prevResult":{"cniVersion":"1.1.0","interfaces":[null,{"name":"eth0","mac":"x","sandbox":"/n"}],"ips":[null,{"interface":9,"address":"::1/128"}],"routes":[null]}}`), "")
	f.Fuzz(func(t *testing.T, stdin []byte, args string) {
		a := &skel.CmdArgs{ContainerID: "c", IfName: "eth0", Netns: "/n", Args: args, StdinData: stdin}
		for _, lenient := range []bool{true, false} {
			c, err := parse(a, lenient)
			if (c == nil) == (err == nil) {
				t.Fatalf("exactly one of %v and %v is wanted", c, err)
			}
			if err != nil {
				var e *types.Error
				if !errors.As(asError("x", err), &e) || e.Code != 4 && e.Code != 6 && e.Code != 7 {
					t.Fatalf("%v has code %d", err, e.Code)
				}
				continue
			}
			l := lease.Lease{Attachment: c.attachment, HostDevice: "web-abcde", Addresses: []netip.Addr{netip.MustParseAddr("10.244.1.5")}}
			r := c.result(l, c.device(l))
			if c.prev != nil {
				c.expected(l)
			}
			if r.CNIVersion = types100.ImplementedSpecVersion; !slices.Contains([]string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"}, c.CNIVersion) {
				continue
			}
			_, _ = r.GetAsVersion(c.CNIVersion)
		}
	})
}

func FuzzResponse(f *testing.F) {
	f.Add([]byte("HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n{}"))
	f.Add([]byte("HTTP/1.1 404 Not Found\r\n\r\n"))
	f.Add([]byte("HTTP/1.0 \r\n\r\n"))
	f.Add([]byte("HTTP/1.0 x\r\n\r\nbody"))
	f.Fuzz(func(t *testing.T, data []byte) {
		before := slices.Clone(data)
		status, body, ok := parseResponse(data)
		if !ok && (status != 0 || body != nil) || !slices.Equal(before, data) {
			t.Errorf("%d %q %v", status, body, ok)
		}
	})
}

// TestConfigOfTheContract is the conflist as the agent's side has it.
func TestConfigOfTheContract(t *testing.T) {
	data, err := os.ReadFile("testdata/10-fathom.conflist")
	if err != nil {
		t.Fatal(err)
	}
	var list struct{ Plugins []json.RawMessage }
	if err := json.Unmarshal(data, &list); err != nil {
		t.Fatal(err)
	}
	c, err := parse(&skel.CmdArgs{StdinData: list.Plugins[0]}, false)
	if err != nil || c.MTU != 1450 || c.CoolDown != 30*time.Second || c.AgentSocket != "/run/fathom/agent.sock" || len(c.Pools) != 1 {
		t.Errorf("%+v, %v", c, err)
	}
}

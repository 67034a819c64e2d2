package svcbench

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/fathom-network/fathom/internal/kit"
)

// cluster is an API server with only Services, EndpointSlices and a Node for each proxy. This package speaks JSON to it
// directly: client-go would take a minute of one processor for the objects alone.
type cluster struct {
	Size
	dir      string
	url      string
	token    string
	client   *http.Client
	programs []*exec.Cmd
	standIn  *standIn // without a kit
}

const (
	apiAddr     = "198.18.255.1"
	apiURL      = "https://" + apiAddr + ":6443"
	standInAddr = apiAddr + ":8080"
	standInURL  = "http://" + standInAddr
	// The ranges of Services, and of endpoints before and after a change.
	serviceRange               = "10.96.0.0/12"
	serviceBase                = "10.97.0.0"
	oldEndpoints, newEndpoints = "10.128.0.0", "10.160.0.0"
	oldRange, newRange         = "10.128.0.0/11", "10.160.0.0/11"
	endpointRange              = "10.128.0.0/10"
	podRange                   = "10.255.0.0/24"
	clusterRange               = "10.128.0.0/9"
)

// startCluster starts etcd and kube-apiserver, or their stand-in if there is no kit.
func startCluster(ctx context.Context, r run, size Size) (*cluster, error) {
	dir := filepath.Join(r.Dir, "cluster")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	c := &cluster{Size: size, dir: dir, url: apiURL, token: rand.Text(), client: &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, MaxIdleConnsPerHost: 64}}} // its certificate is new, and the namespace is private
	if r.KitDir == "" {
		c.url = standInURL
	}
	if err := os.WriteFile(c.kubeconfig(), fmt.Appendf(nil, `apiVersion: v1
kind: Config
current-context: bench
clusters: [{name: bench, cluster: {server: %q, insecure-skip-tls-verify: true}}]
users: [{name: bench, user: {token: %q}}]
contexts: [{name: bench, context: {cluster: bench, user: bench}}]
`, c.url, c.token), 0o600); err != nil {
		return nil, err
	}
	if r.KitDir == "" {
		var err error
		c.standIn, err = newStandIn()
		return c, err
	}
	k, err := kit.Open(r.KitDir)
	if err != nil {
		return nil, err
	}
	return c, c.startPrograms(ctx, k)
}

// startPrograms starts etcd and the API server, and returns when it is ready.
func (c *cluster) startPrograms(ctx context.Context, k kit.Kit) error {
	dir := c.dir
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	for name, data := range map[string][]byte{
		"sa.key":     pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}),
		"tokens.csv": fmt.Appendf(nil, "%s,admin,admin,system:masters\n", c.token),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			return err
		}
	}
	keyFile := filepath.Join(dir, "sa.key")
	for _, command := range [][]string{
		{"etcd", "--data-dir=" + filepath.Join(dir, "etcd"), "--unsafe-no-fsync", "--quota-backend-bytes=8000000000", "--listen-client-urls=http://127.0.0.1:2379",
			"--advertise-client-urls=http://127.0.0.1:2379", "--listen-peer-urls=http://127.0.0.1:2380",
			"--initial-advertise-peer-urls=http://127.0.0.1:2380", "--initial-cluster=default=http://127.0.0.1:2380"},
		{"kube-apiserver", "--etcd-servers=http://127.0.0.1:2379", "--bind-address=0.0.0.0", "--advertise-address=" + apiAddr, "--secure-port=6443",
			"--cert-dir=" + filepath.Join(dir, "certs"), "--service-account-issuer=https://kubernetes", "--service-account-key-file=" + keyFile,
			"--service-account-signing-key-file=" + keyFile, "--token-auth-file=" + filepath.Join(dir, "tokens.csv"), "--authorization-mode=RBAC",
			"--service-cluster-ip-range=" + serviceRange, "--disable-admission-plugins=ServiceAccount", "--enable-priority-and-fairness=false",
			"--max-requests-inflight=4000", "--max-mutating-requests-inflight=2000"},
	} {
		log, err := os.Create(filepath.Join(dir, command[0]+".log"))
		if err != nil {
			return err
		}
		cmd := exec.Command(k.Bin(command[0]), command[1:]...)
		cmd.Stdout, cmd.Stderr = log, log
		err = cmd.Start()
		log.Close()
		if err != nil {
			return err
		}
		c.programs = append(c.programs, cmd)
	}
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		err := c.do(ctx, http.MethodGet, "/readyz", "", nil)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil || time.Now().After(deadline) {
			text, _ := os.ReadFile(filepath.Join(dir, "kube-apiserver.log"))
			return fmt.Errorf("start an API server: it is not ready: %w\n%s", err, text[max(0, len(text)-1000):])
		}
	}
}

func (c *cluster) kubeconfig() string { return filepath.Join(c.dir, "kubeconfig") }

func (c *cluster) stop() {
	for _, cmd := range c.programs {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // returns that it was killed
	}
	if c.standIn != nil {
		_ = c.standIn.server.Close()
	}
	c.client.CloseIdleConnections()
	os.RemoveAll(c.dir)
}

func (c *cluster) request(ctx context.Context, method, path, kind string, body any) (*http.Response, error) {
	var data []byte
	if body != nil {
		var err error
		if data, err = json.Marshal(body); err != nil {
			return nil, err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, c.url+path, bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+c.token)
	if kind != "" {
		req.Header.Set("Content-Type", kind)
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 != 2 {
		defer resp.Body.Close()
		text, _ := io.ReadAll(resp.Body)
		return nil, fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, bytes.TrimSpace(text[:min(len(text), 500)]))
	}
	return resp, nil
}

func (c *cluster) do(ctx context.Context, method, path, kind string, body any) error {
	resp, err := c.request(ctx, method, path, kind, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}

type object map[string]any

const (
	servicesPath = "/api/v1/namespaces/default/services"
	slicesPath   = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
	ofJSON       = "application/json"
	ofMergePatch = "application/merge-patch+json"
)

func serviceName(i int) string { return fmt.Sprintf("s-%d", i) }

// endpoints returns a Service's endpoints, before or after a change.
func (c *cluster) endpoints(base string, i int) []object {
	var all []object
	for j := range c.Endpoints {
		all = append(all, object{"addresses": []string{nth(base, 1+i*c.Endpoints+j).String()}, "conditions": object{"ready": true}})
	}
	return all
}

// load creates all objects.
func (c *cluster) load(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(32)
	for i := range c.Services {
		g.Go(func() error {
			name := serviceName(i)
			err := c.create(ctx, "services", servicesPath, object{"apiVersion": "v1", "kind": "Service", "metadata": object{"name": name},
				"spec": object{"clusterIP": nth(serviceBase, i+1).String(), "ports": []object{{"name": "http", "port": servicePort, "targetPort": serverPort, "protocol": "TCP"}}}})
			if err != nil {
				return err
			}
			return c.create(ctx, "endpointslices", slicesPath, object{"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
				"metadata": object{"name": name, "labels": object{"kubernetes.io/service-name": name}}, "addressType": "IPv4",
				"ports": []object{{"name": "http", "port": serverPort, "protocol": "TCP"}}, "endpoints": c.endpoints(oldEndpoints, i)})
		})
	}
	return g.Wait()
}

// create creates an object. A stand-in for the API server gets it by a function call: its speed is not measured, and a
// hundred thousand requests take minutes.
func (c *cluster) create(ctx context.Context, resource, path string, o object) error {
	if c.standIn == nil {
		return c.do(ctx, http.MethodPost, path, ofJSON, o)
	}
	text, err := json.Marshal(o)
	if err != nil {
		return err
	}
	if err := c.standIn.put(c.standIn.lists[resource], "", text); err != nil {
		return err
	}
	return ctx.Err()
}

// addNode creates the Node that a kube-proxy looks for.
func (c *cluster) addNode(ctx context.Context, name, addr string) error {
	return c.do(ctx, http.MethodPost, "/api/v1/nodes", ofJSON, object{"apiVersion": "v1", "kind": "Node", "metadata": object{"name": name},
		"spec": object{"podCIDR": podRange, "podCIDRs": []string{podRange}}, "status": object{"addresses": []object{{"type": "InternalIP", "address": addr}}}})
}

// change replaces a Service's endpoints.
func (c *cluster) change(ctx context.Context, i int, base string) error {
	return c.do(ctx, http.MethodPatch, slicesPath+"/"+serviceName(i), ofMergePatch, object{"endpoints": c.endpoints(base, i)})
}

// watch sends the time at which a change of a Service's slice is reported.
func (c *cluster) watch(ctx context.Context, i int) (<-chan time.Time, error) {
	resp, err := c.request(ctx, http.MethodGet, slicesPath+"?watch=1&fieldSelector=metadata.name="+serviceName(i), "", nil)
	if err != nil {
		return nil, err
	}
	seen := make(chan time.Time, 1000)
	go func() {
		defer resp.Body.Close()
		defer close(seen)
		for d := json.NewDecoder(resp.Body); ; {
			var event struct {
				Type string `json:"type"`
			}
			if d.Decode(&event) != nil {
				return
			}
			if event.Type == "MODIFIED" {
				seen <- time.Now()
			}
		}
	}()
	return seen, nil
}

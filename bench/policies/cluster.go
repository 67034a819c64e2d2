package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/fathom-network/fathom/internal/kernel/link"
)

// apiAddr is where nodes reach the API server: an address of this process's namespace.
const apiAddr = "198.18.255.1"

const token = "policies"

// cluster is an API server, with what is in front of it.
type cluster struct {
	*kubernetes.Clientset
	pair tls.Certificate // of the fronts
	ca   []byte
	dir  string
	port int // of the next front
}

// beginCluster starts etcd and kube-apiserver in this namespace.
func (b *bench) beginCluster(ctx context.Context) error {
	here, err := link.Here()
	if err != nil {
		return err
	}
	b.here = here
	if err := here.SetUp("lo", true); err != nil {
		return err
	}
	if _, err := command(here, "", nil, "ip", "addr", "add", apiAddr+"/32", "dev", "lo"); err != nil {
		return err
	}
	b.cluster = &cluster{dir: b.dir, port: 7000}
	key, err := b.cluster.certify()
	if err != nil {
		return err
	}
	sa, tokens := filepath.Join(b.dir, "sa.key"), filepath.Join(b.dir, "tokens")
	if err := errors.Join(os.WriteFile(sa, key, 0o600), os.WriteFile(tokens, []byte(token+",admin,1,system:masters\n"), 0o600)); err != nil {
		return err
	}
	const etcd, peers = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
	if err := b.start(here, "etcd", nil, filepath.Join(b.kit, "bin/etcd"), "--data-dir", filepath.Join(b.dir, "etcd"), "--unsafe-no-fsync", "--listen-client-urls", etcd,
		"--advertise-client-urls", etcd, "--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers, "--initial-cluster", "default="+peers, "--log-level", "error"); err != nil {
		return err
	}
	if err := b.start(here, "kube-apiserver", nil, filepath.Join(b.kit, "bin/kube-apiserver"), "--etcd-servers="+etcd, "--cert-dir="+filepath.Join(b.dir, "certs"),
		"--secure-port=6443", "--bind-address=127.0.0.1", "--advertise-address="+apiAddr, "--token-auth-file="+tokens, "--authorization-mode=AlwaysAllow",
		"--service-cluster-ip-range=10.96.0.0/16", "--disable-admission-plugins=ServiceAccount", "--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file="+sa, "--service-account-signing-key-file="+sa, "--enable-priority-and-fairness=false", "--max-requests-inflight=2000", "--max-mutating-requests-inflight=1000"); err != nil {
		return err
	}
	if b.cluster.Clientset, err = kubernetes.NewForConfig(&rest.Config{Host: "https://127.0.0.1:6443", BearerToken: token, QPS: -1,
		TLSClientConfig: rest.TLSClientConfig{Insecure: true}, ContentConfig: rest.ContentConfig{ContentType: "application/vnd.kubernetes.protobuf"}}); err != nil {
		return err
	}
	if err := eventually(ctx, func() error {
		_, err := b.cluster.CoreV1().Namespaces().Get(ctx, "default", metav1.GetOptions{})
		return err
	}); err != nil {
		return fmt.Errorf("%w; %s%s", err, b.log("etcd"), b.log("kube-apiserver"))
	}
	return nil
}

// certify makes the certificate that all fronts show, and returns its key.
func (c *cluster) certify() ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "policies"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		IPAddresses: []net.IP{net.ParseIP(apiAddr)}, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	c.pair = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	c.ca = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	private, err := x509.MarshalECPrivateKey(key)
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: private}), err
}

// front is a proxy before the API server for the nodes of one way: they hear of their own nodes and pods, and of so many policies, as if there
// were a cluster for each. The API server selects.
func (c *cluster) front(way, policies int) (port int, err error) {
	within := "0" // there is no policy of that size
	if policies > 0 {
		within = fmt.Sprint("w", way)
	}
	for _, n := range sizes {
		if n <= policies {
			within += fmt.Sprintf(",%d", n)
		}
	}
	selectors := map[string]string{"networkpolicies": sizeLabel + " in (" + within + ")", "pods": fmt.Sprintf("%s=w%d", wayLabel, way), "nodes": fmt.Sprintf("%s=w%d", wayLabel, way)}
	server, err := url.Parse("https://127.0.0.1:6443")
	if err != nil {
		return 0, err
	}
	proxy := &httputil.ReverseProxy{FlushInterval: -1, ErrorLog: log.New(&bytes.Buffer{}, "", 0),
		Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, MaxIdleConnsPerHost: 100}, // the bench's own server
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(server)
			selector := selectors[r.In.URL.Path[strings.LastIndex(r.In.URL.Path, "/")+1:]]
			if selector == "" || r.In.Method != http.MethodGet {
				return
			}
			q := r.Out.URL.Query()
			if own := q.Get("labelSelector"); own != "" {
				selector += "," + own
			}
			q.Set("labelSelector", selector)
			r.Out.URL.RawQuery = q.Encode()
		}}
	c.port++
	listener, err := tls.Listen("tcp", fmt.Sprintf("%s:%d", apiAddr, c.port), &tls.Config{Certificates: []tls.Certificate{c.pair}, NextProtos: []string{"h2", "http/1.1"}, MinVersion: tls.VersionTLS12})
	if err != nil {
		return 0, err
	}
	s := &http.Server{Handler: proxy, ReadHeaderTimeout: time.Minute, ErrorLog: log.New(&bytes.Buffer{}, "", 0)}
	go func() { _ = s.Serve(listener) }()
	return c.port, nil
}

func (c *cluster) kubeconfig(port int) (string, error) {
	path := filepath.Join(c.dir, fmt.Sprintf("kubeconfig-%d", port))
	return path, os.WriteFile(path, fmt.Appendf(nil, `{"apiVersion": "v1", "kind": "Config", "current-context": "x",
		"clusters": [{"name": "x", "cluster": {"server": "https://%s:%d", "insecure-skip-tls-verify": true}}],
		"users": [{"name": "x", "user": {"token": %q}}], "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}]}`, apiAddr, port, token), 0o600)
}

// fill makes the objects of all ways, and as many policies as one of them has at most.
func (c *cluster) fill(ctx context.Context, ways, policies int) error {
	for i := range namespaces {
		if _, err := c.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace(i)}}, metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	if _, err := c.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "fathom-system"}}, metav1.CreateOptions{}); err != nil {
		return err
	}
	if _, err := c.CoreV1().ConfigMaps("fathom-system").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "fathom-config"},
		Data: map[string]string{"mode": "direct"}}, metav1.CreateOptions{}); err != nil {
		return err
	}
	var all errgroup.Group
	all.SetLimit(8)
	for _, p := range crowdPolicies()[:policies] {
		all.Go(func() error {
			_, err := c.NetworkingV1().NetworkPolicies(p.Namespace).Create(ctx, p, metav1.CreateOptions{})
			return err
		})
	}
	for way := range ways {
		for i := 1; i <= 2; i++ {
			all.Go(func() error { return c.addNode(ctx, way, i) })
		}
		for i := range allPods {
			all.Go(func() error {
				p, err := c.CoreV1().Pods(namespace(i)).Create(ctx, crowdPod(way, i), metav1.CreateOptions{})
				if err != nil || isReal(i) {
					return err
				}
				return c.setAddr(ctx, p, fakeAddr(i))
			})
		}
	}
	return all.Wait()
}

func (c *cluster) addNode(ctx context.Context, way, i int) error {
	cidr := podRange(i).String()
	n, err := c.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: nodeName(way, i), Labels: map[string]string{wayLabel: fmt.Sprint("w", way)}},
		Spec: corev1.NodeSpec{PodCIDR: cidr, PodCIDRs: []string{cidr}}}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: nodeAddr(i).String()}}
	_, err = c.CoreV1().Nodes().UpdateStatus(ctx, n, metav1.UpdateOptions{})
	return err
}

// setAddr says of a pod what a kubelet does when it runs.
func (c *cluster) setAddr(ctx context.Context, p *corev1.Pod, addr netip.Addr) error {
	p.Status.Phase, p.Status.PodIP, p.Status.PodIPs = corev1.PodRunning, addr.String(), []corev1.PodIP{{IP: addr.String()}}
	_, err := c.CoreV1().Pods(p.Namespace).UpdateStatus(ctx, p, metav1.UpdateOptions{})
	return err
}

func nodeName(way, i int) string { return fmt.Sprintf("w%d-node%d", way, i) }

// start starts a program, which lives as long as this one.
func (b *bench) start(n *link.Namespace, name string, env []string, argv ...string) error {
	_, err := b.startProgram(n, name, env, argv...)
	return err
}

func (b *bench) startProgram(n *link.Namespace, name string, env []string, argv ...string) (*exec.Cmd, error) {
	log, err := os.OpenFile(filepath.Join(b.dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := n.Start(cmd); err != nil {
		return nil, err
	}
	b.programs = append(b.programs, cmd)
	return cmd, nil
}

// stop ends a program that was started.
func (b *bench) stop(cmd *exec.Cmd) {
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	b.programs = slices.DeleteFunc(b.programs, func(c *exec.Cmd) bool { return c == cmd })
}

// end ends what was started. Namespaces and mounts go with this process.
func (b *bench) end() {
	for len(b.programs) > 0 {
		b.stop(b.programs[0])
	}
}

func command(n *link.Namespace, input string, env []string, argv ...string) (string, error) {
	var out, problems bytes.Buffer
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &out, &problems
	err := n.Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s%.2000s", strings.Join(argv, " "), err, out.Bytes(), problems.Bytes())
	}
	return out.String(), nil
}

func eventually(ctx context.Context, try func() error) error {
	var err error
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if err = try(); err == nil || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
	}
	return fmt.Errorf("not within a minute: %w", err)
}

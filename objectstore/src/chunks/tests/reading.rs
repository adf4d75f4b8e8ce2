//! Reading images back: by us, by casync, and what is refused.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn hostile_images_are_refused() {
    let (store, dir) = (MemoryStore::new(), tempfile::tempdir().unwrap());
    let chunks = open(&store).await;
    let content = image(&[1, 2, 0, 3], 9);
    let done = upload(&chunks, &dir.path().join("a"), &content).await;
    chunks.put_index(&done).await.unwrap();
    let target = dir.path().join("out");
    let key = chunks.layout().chunk(&ChunkId::of(&chunk(2, C)));
    let good = store.bytes(&key).unwrap();
    // A bomb; other content; more than a frame of this chunk can be; nothing.
    let bomb = Bytes::from(zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap());
    let other = crate::chunks::frame::compress(&chunk(3, C)).unwrap();
    for bad in [bomb, other, Bytes::from(vec![0; 1 << 20])] {
        store.set(&key, bad);
        let result = restore(&chunks, done.digest, &target).await;
        assert!(matches!(result, Err(ReadError::CorruptChunk { .. })), "{result:?}");
    }
    store.remove(&key);
    let result = restore(&chunks, done.digest, &target).await;
    assert!(matches!(result, Err(ReadError::MissingChunk { .. })), "{result:?}");
    store.set(&key, good);
    restore(&chunks, done.digest, &target).await.unwrap();

    let index_key = chunks.layout().image(&done.digest);
    let index = store.bytes(&index_key).unwrap().to_vec();
    let mut wrong = index.clone();
    wrong[caibx::HEAD + 9] ^= 1;
    store.set(&index_key, wrong);
    let reader = ImageReader::open(chunks.clone(), done.digest).await.unwrap();
    assert!(matches!(reader.verify_index().await, Err(ReadError::WrongIndex { .. })));
    let taken = ImageReader::open_local(chunks.clone(), done.digest, &dir.path().join("i")).await;
    assert!(matches!(taken.err(), Some(ReadError::WrongIndex { .. })));
    assert!(!dir.path().join("i").exists());
    // Items that go backwards, or claim 1 TiB.
    for end in [0_u64, 1 << 40] {
        let mut wrong = index.clone();
        wrong[caibx::HEAD + caibx::ITEM..caibx::HEAD + caibx::ITEM + 8].copy_from_slice(&end.to_le_bytes());
        store.set(&index_key, wrong);
        let result = restore(&chunks, done.digest, &target).await;
        assert!(matches!(result, Err(ReadError::Index { .. })), "{result:?}");
    }
    store.remove(&index_key);
    assert!(matches!(restore(&chunks, done.digest, &target).await, Err(ReadError::NotFound { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_from_any_offset() {
    let (store, dir) = (MemoryStore::new(), tempfile::tempdir().unwrap());
    let chunks = open(&store).await;
    let content = image(&[1, 0, 0, 2, 3, 0, 4], 100);
    let done = upload(&chunks, &dir.path().join("a"), &content).await;
    chunks.put_index(&done).await.unwrap();
    let local = dir.path().join("i");
    let far = ImageReader::open(chunks.clone(), done.digest).await.unwrap();
    let near = ImageReader::open_local(chunks.clone(), done.digest, &local).await.unwrap();
    store.clear_log();
    ImageReader::open_local(chunks.clone(), done.digest, &local).await.unwrap();
    assert!(store.log().is_empty(), "a whole local index is used again");
    for reader in [far, near] {
        for offset in [0, 1, C, C + 1, 3 * C - 1, 3 * C, 7 * C, 7 * C + 99] {
            let mut items = reader.items_from(offset as u64).await.unwrap();
            let item = items.next().await.unwrap().unwrap();
            assert!(item.start <= offset as u64 && (offset as u64) < item.end(), "{item:?} for {offset}");
            let start = usize::try_from(item.start).unwrap();
            let end = usize::try_from(item.end()).unwrap();
            assert_eq!(reader.fetch(&item).await.unwrap(), content[start..end]);
        }
        assert_eq!(reader.items_from(content.len() as u64).await.unwrap().next().await.unwrap(), None);
        let target = tempfile::tempfile().unwrap();
        target.set_len(content.len() as u64).unwrap();
        let target = Arc::new(target);
        let mut seen = Vec::new();
        let from = 4 * C as u64;
        let restored =
            reader.restore(Arc::clone(&target), from, |done| seen.push(done.offset)).await.unwrap();
        assert!(seen.is_sorted() && restored.offset == content.len() as u64);
        let mut back = vec![0; content.len()];
        target.read_exact_at(&mut back, 0).unwrap();
        assert!(back[..4 * C].iter().all(|b| *b == 0) && back[4 * C..] == content[4 * C..]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_counts_what_no_image_names() {
    let (store, dir) = (MemoryStore::new(), tempfile::tempdir().unwrap());
    let chunks = open(&store).await;
    let kept = upload(&chunks, &dir.path().join("a"), &image(&[1, 2, 0], 0)).await;
    chunks.put_index(&kept).await.unwrap();
    let lost = upload(&chunks, &dir.path().join("b"), &image(&[1, 3, 4], 0)).await;
    store.page_size(2);
    let found = usage(&chunks).await.unwrap();
    let size =
        |seed| store.bytes(&chunks.layout().chunk(&ChunkId::of(&chunk(seed, C)))).unwrap().len() as u64;
    assert_eq!((found.images, found.unreferenced_chunks), (1, 2));
    assert_eq!(found.unreferenced_bytes, Size(size(3) + size(4)));
    let zero = store.bytes(&chunks.layout().chunk(&zero_id(Size(C as u64)).unwrap())).unwrap().len() as u64;
    assert_eq!(found.unique_bytes, Size((1..=4).map(size).sum::<u64>() + zero));
    chunks.put_index(&lost).await.unwrap();
    let found = usage(&chunks).await.unwrap();
    assert_eq!((found.images, found.unreferenced_chunks, found.unreferenced_bytes), (2, 0, Size(0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn casync_gives_back_what_was_written() {
    if Command::new("casync").arg("--version").output().is_err() {
        eprintln!("skipped: casync is not installed");
        return;
    }
    let (store, dir) = (MemoryStore::new(), tempfile::tempdir().unwrap());
    let chunks = open(&store).await;
    let mut uploader =
        ChunkUploader::new(chunks.clone(), Arc::default(), &dir.path().join("x.caibx")).unwrap();
    for seed in 1..=20 {
        uploader.push_data(chunk(seed, C)).await.unwrap();
        uploader.push_zero(Size(u64::from(seed) * C as u64)).await.unwrap();
    }
    uploader.push_zero(Size::mib(200)).await.unwrap();
    uploader.push_data(chunk(21, 12345)).await.unwrap();
    let done = uploader.finish().await.unwrap();
    verify(&chunks, &done, |_| ()).await.unwrap();
    chunks.put_index(&done).await.unwrap();
    for key in store.keys("p/chunks/") {
        let path = dir.path().join(key.strip_prefix("p/").unwrap());
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, store.bytes(&key).unwrap()).unwrap();
    }
    let theirs = dir.path().join("theirs");
    let output = Command::new("casync")
        .arg("extract")
        .arg(format!("--store={}", dir.path().join("chunks").display()))
        .args([&done.path, &theirs])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let ours = dir.path().join("ours");
    restore(&chunks, done.digest, &ours).await.unwrap();
    let theirs = std::fs::read(theirs).unwrap();
    assert_eq!(theirs.len() as u64, done.virtual_size.0);
    assert!(theirs == std::fs::read(ours).unwrap());
    assert_eq!(theirs[theirs.len() - 12345..], chunk(21, 12345)[..]);
}
